"""USP Sampler: KSampler's inputs, KSampler's result; the loop runs in the workers where it can."""

from .comfyui import common_ksampler, io, samplers, search_aliases


class USPSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPSampler",
            display_name="USP Sampler",
            category="FastUSP",
            **search_aliases("multi gpu", "multigpu", "parallel", "ksampler"),
            description="Samples a MODEL of USP Loader on all its ranks, with the same result as KSampler. Any other "
            "MODEL is sampled as KSampler does.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with; USP Loader's runs on all ranks."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise. The same seed gives KSampler's picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of denoising steps."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale. 1 leaves the negative prompt out and takes one evaluation a step: right "
                    "for FLUX, whose guidance is FluxGuidance's.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=samplers.KSampler.SAMPLERS,
                    tooltip="The sampling algorithm. The common ones loop in the workers; every other one steps "
                    "from ComfyUI, with the same result.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise falls over the steps.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; unused while cfg is 1."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise: empty, or an image for img2img."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is sampled anew; lower values keep more of latent_image.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
    ) -> io.NodeOutput:
        # The model brings its loop along (remote_loop.py), so KSampler's own path is the whole work.
        return io.NodeOutput(
            *common_ksampler(
                model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
            )
        )
