"""FLUX.2 gives the same latents as stock UNETLoader + KSampler; a ComfyUI that does not know it says so."""

from dataclasses import replace

import loras
import pytest
from comfy import PromptFailed
from formats import write
from safetensors.torch import save_file
from workflows import IN_WORKERS, SMALL_FLUX2, STEPPING, Comparison, Graph, Link

from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.host

DEV, KLEIN = "flux2_dev.safetensors", "flux2_klein.safetensors"
LAYOUTS = (("cpu:1", 1, 1), ("cpu:2", 2, 1), ("cpu:2", 1, 2))


@pytest.fixture(scope="module")
def folder(host, flux2):
    """With a dev and a klein file."""
    assert flux2 == DEV
    path = host.base / "models/diffusion_models"
    write_checkpoint(str(path / KLEIN), replace(SMALL_FLUX2, guidance=False), seed=1)
    before = set(path.iterdir())
    yield path
    for file in {path / KLEIN} | (set(path.iterdir()) - before):
        file.unlink()


def prompt(graph: Graph, tokens: int, guidance: float = 4.0) -> Link:
    """With the mask that FLUX.2's text encoders give, and ComfyUI leaves without effect."""
    plain = graph.prompt(tokens, tokens, guidance, SMALL_FLUX2.context)
    return graph.node("TestMaskedConditioning", conditioning=plain, effective=False)


def empty(graph: Graph, width: int = 96, height: int = 64, batch: int = 1) -> Link:
    return graph.node("EmptyFlux2LatentImage", width=width, height=height, batch_size=batch)


def check(host, cases, **common) -> None:
    """cases: (label, file, inputs, where); both models in one prompt each, with 2 steps."""
    both = Comparison()
    graph = both.graph
    plain = {"positive": prompt(graph, 12), "negative": prompt(graph, 6), "latent_image": empty(graph), "steps": 2}
    for label, file, make, where in cases:
        got, want = (
            graph.sample(model, **plain | common | make(graph)) for model in (graph.usp(file=file), graph.stock(file))
        )
        both.add(label, got, want, where)
    both.check(host)


@pytest.mark.parametrize("file, cfg", [(DEV, 2.5), pytest.param(KLEIN, 1.0, marks=pytest.mark.thorough)])
def test_layouts_and_guidance(host, folder, file, cfg):
    """5 x 7 tokens; prompts of two lengths, of which ComfyUI pads the shorter one to 512 tokens."""
    layouts = Comparison()
    graph = layouts.graph
    inputs = {"positive": prompt(graph, 530), "negative": prompt(graph, 6), "latent_image": empty(graph, 112, 80)}
    want = graph.sample(graph.stock(file), cfg=cfg, steps=2, **inputs)
    for gpus, ulysses, ring in LAYOUTS:
        usp = graph.usp(gpus, ulysses, ring, file=file)
        got = graph.sample(usp, cfg=cfg, steps=2, **inputs)
        layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, {IN_WORKERS}")
    layouts.check(host)


def test_images_masks_and_stepping(host, folder):
    def masked(graph: Graph) -> dict:
        return {"latent_image": graph.latent(96, 80, 2, masked=True, flux2=True), "denoise": 0.7}

    def without(graph: Graph) -> dict:
        return {"positive": graph.node("FluxDisableGuidance", conditioning=prompt(graph, 12))}

    def area(graph: Graph) -> dict:
        cut = graph.node(
            "ConditioningSetArea", conditioning=prompt(graph, 9), width=64, height=64, x=0, y=0, strength=1.0
        )
        return {"positive": graph.node("ConditioningCombine", conditioning_1=cut, conditioning_2=prompt(graph, 8))}

    check(
        host,
        [
            ("masked", DEV, masked, IN_WORKERS),
            ("stepping", DEV, lambda _: {"sampler_name": "uni_pc", "cfg": 2.5}, STEPPING),
            ("ancestral", KLEIN, lambda _: {"sampler_name": "euler_ancestral"}, IN_WORKERS),
            ("no guidance", DEV, without, IN_WORKERS),
            ("area", DEV, area, STEPPING),
        ],
    )


def test_references(host, folder):
    sizes = (80, 48), (64, 112)

    def referring(method: str | None = None, **more):
        return lambda graph: {"positive": graph.referring(prompt(graph, 9), *sizes, method=method, flux2=True), **more}

    step = {"sampler_name": "uni_pc"}
    check(
        host,
        [
            ("as the model has it", DEV, referring(), IN_WORKERS),
            ("one prompt's alone", KLEIN, referring(cfg=2.5), IN_WORKERS),
            ("stepping", DEV, referring(**step), STEPPING),
            ("uxo", DEV, referring("uxo/uno"), IN_WORKERS),
            ("timestep zero", DEV, referring("index_timestep_zero"), IN_WORKERS),
            ("timestep zero, stepping", KLEIN, referring("index_timestep_zero", **step), STEPPING),
        ],
    )


def test_the_templates_nodes(host, folder):
    """SamplerCustomAdvanced with Flux2Scheduler, as ComfyUI's own template has them."""
    both = Comparison()
    graph = both.graph
    guided = graph.node("FluxGuidance", conditioning=prompt(graph, 12), guidance=2.0)
    sigmas = graph.node("Flux2Scheduler", steps=2, width=96, height=64)
    shared = {
        "noise": graph.node("RandomNoise", noise_seed=3),
        "sampler": graph.node("KSamplerSelect", sampler_name="euler"),
        "sigmas": sigmas,
        "latent_image": empty(graph),
    }
    got, want = (
        graph.node(
            "SamplerCustomAdvanced", guider=graph.node("BasicGuider", model=model, conditioning=guided), **shared
        )
        for model in (graph.usp(file=DEV), graph.stock(DEV))
    )
    both.add("template", got, want)
    both.check(host)


def test_formats_and_loras(host, folder):
    """A LoRA in both ways of naming; scaled fp8; GGUF against a plain file of its values."""
    lora = loras.write(
        host.base / "models/loras", "flux2", loras.flux2_names(SMALL_FLUX2.hidden, SMALL_FLUX2.mlp, seed=0)
    )
    both = Comparison()
    graph = both.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 6), "latent_image": empty(graph), "steps": 1}
    patched = [
        graph.node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=0.8)
        for model in (graph.usp(file=DEV), graph.stock(DEV))
    ]
    both.add("LoRA", *(graph.sample(model, **inputs) for model in patched))
    for name, file in (("scaled_metadata", "flux2_fp8.safetensors"), ("gguf_Q8_0", "flux2_Q8_0.gguf")):
        save_file(write(name, folder / DEV, folder / file), folder / f"plain_flux2_{name}.safetensors")
        models = graph.usp(file=file), graph.stock(f"plain_flux2_{name}.safetensors")
        both.add(name, *(graph.sample(model, **inputs) for model in models))
    both.check(host)
    assert "lora key not loaded" not in host.log_text().rpartition("got prompt")[2]


@pytest.mark.any_host
def test_a_comfyui_that_does_not_know_it(host, folder):
    if "EmptyFlux2LatentImage" in host.get("/object_info"):
        pytest.skip("this ComfyUI knows FLUX.2")
    graph = Graph()
    graph.save(graph.sample(graph.usp(file=DEV)))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "this ComfyUI does not know FLUX.2 of hidden size 256; update it" in refused.value.text
