"""Two nodes and a model that need no download: a prompt for the small model that is shipped, and its pictures."""

from pathlib import PurePath

from ..fastusp_backend import shapes
from .comfyui import folder_paths, io

_FLUX_SCALE, _FLUX_SHIFT = 0.3611, 0.1159
"""By which ComfyUI's latents of FLUX.1 differ from those that its models see: (latent - shift) scale."""


def offer_model() -> None:
    """Lists the model that is shipped among ComfyUI's diffusion models."""
    folder_paths.add_model_folder_path("diffusion_models", str(shapes.MODEL.parent))


def preview_as_drawn(latent_format, path: str) -> None:
    """Has ComfyUI's previews show the shipped model's colours. FLUX.1's, which its latent format knows, are of latents
    that a VAE makes."""
    if PurePath(path).name == shapes.MODEL.name:
        latent_format.latent_rgb_factors = shapes.preview_factors()
        latent_format.latent_rgb_factors_bias = None
        latent_format.taesd_decoder_name = None


class USPDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPDemoPrompt",
            display_name="USP Demo Prompt",
            category="FastUSP/demo",
            description="A prompt for fastusp_shapes.safetensors, the small model that comes with FastUSP and draws "
            "coloured shapes. A word that it does not know is refused, with all that it knows.",
            inputs=[
                io.String.Input(
                    "text",
                    default="a red circle left of a blue square",
                    tooltip='One or two shapes, as "a large yellow triangle on black" or "a small green square above a '
                    'large purple circle on grey".',
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For positive, and for negative.")],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        prompt = shapes.prompt([shapes.Caption.read(text)])
        return io.NodeOutput([[prompt.context, {"pooled_output": prompt.y, "guidance": shapes.GUIDANCE}]])


class USPDemoDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPDemoDecode",
            display_name="USP Demo Decode",
            category="FastUSP/demo",
            description="The pictures of fastusp_shapes.safetensors' latents, in the place of VAE Decode.",
            inputs=[io.Latent.Input("samples", tooltip="Latents of 16 channels that the model drew.")],
            outputs=[io.Image.Output(display_name="image", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, samples) -> io.NodeOutput:
        latents = samples["samples"].float()
        if latents.dim() != 4 or latents.shape[1] != 16:
            raise ValueError(
                f"Connect latents that {shapes.MODEL.name} drew, of 16 channels, to USP Demo Decode: these are of "
                f"shape {tuple(latents.shape)}"
            )
        return io.NodeOutput(shapes.decode((latents - _FLUX_SHIFT) * _FLUX_SCALE).movedim(1, -1))
