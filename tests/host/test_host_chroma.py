"""Chroma gives the same latents as stock UNETLoader + KSampler."""

import controlnets
import loras
import pytest
from comfy import PromptFailed
from formats import write
from safetensors.torch import load_file, save_file
from workflows import IN_WORKERS, SMALL_CHROMA, STEPPING, Comparison, Graph, difference

pytestmark = pytest.mark.host

LAYOUTS = {1.0: (("cpu:1", 1, 1), ("cpu:2", 1, 2)), 3.0: (("cpu:1", 1, 1), ("cpu:2", 2, 1))}
"""By cfg."""


@pytest.fixture(scope="module")
def folder(host, chroma):
    path = host.base / "models/diffusion_models"
    before = set(path.iterdir())
    yield path
    for file in set(path.iterdir()) - before:
        file.unlink()


def prompt(graph: Graph, tokens: int, seed: int = 1):
    """With pooled text, which has no effect."""
    return graph.prompt(seed, tokens, guidance=0.0)


@pytest.mark.any_host
def test_layouts_and_guidance(host, chroma):
    """5 x 7 patches; prompts of two lengths, the shorter one of one token."""
    layouts = Comparison()
    graph = layouts.graph
    stock = graph.stock(chroma)
    inputs = {"positive": prompt(graph, 37), "negative": prompt(graph, 1), "latent_image": graph.empty(112, 80)}
    for cfg, among in LAYOUTS.items():
        want = graph.sample(stock, cfg=cfg, steps=2, **inputs)
        for gpus, ulysses, ring in among:
            got = graph.sample(graph.usp(gpus, ulysses, ring, file=chroma), cfg=cfg, steps=2, **inputs)
            layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers")
    got = graph.sample(graph.usp("cpu:2", file=chroma), cfg=cfg, steps=2, **inputs)
    layouts.add("a prompt for each", got, want, "batch 2 x ulysses 1 x ring 1 on cpu:2, loop in the workers")
    layouts.check(host)


@pytest.mark.any_host
def test_odd_sizes_masks_and_stepping(host, chroma):
    """Prompts of one length are evaluated together where ComfyUI steps. A guidance counts where a node sets it."""
    others = Comparison()
    graph = others.graph
    positive, same, shorter = prompt(graph, 12), prompt(graph, 12, seed=2), prompt(graph, 6)
    set_to = {value: graph.node("FluxGuidance", conditioning=positive, guidance=value) for value in (0.5, 3.5)}
    stock, usp = graph.stock(chroma), graph.usp("cpu:2", file=chroma)
    shifted = [graph.node("ModelSamplingAuraFlow", model=model, shift=1.5) for model in (usp, stock)]
    odd, masked = graph.latent(8 * 9, 8 * 7), graph.latent(64, 72, 2, masked=True)
    step = {"sampler_name": "uni_pc"}
    for label, models, more, where in (
        ("shift", shifted, {"negative": shorter, "latent_image": odd}, IN_WORKERS),
        ("masked", (usp, stock), {"negative": same, "latent_image": masked, "denoise": 0.7}, IN_WORKERS),
        ("stepping", (usp, stock), {"negative": same, "latent_image": odd, **step}, STEPPING),
        ("stepping, two lengths", (usp, stock), {"negative": shorter, **step}, STEPPING),
        ("guidance", (usp, stock), {"positive": set_to[3.5], "negative": set_to[0.5]}, IN_WORKERS),
        ("guidance, stepping", (usp, stock), {"positive": set_to[3.5], "negative": shorter, **step}, STEPPING),
    ):
        inputs = {"positive": positive, "steps": 2, "cfg": 2.5} | more
        got, want = (graph.sample(model, **inputs) for model in models)
        others.add(label, got, want, where)
    without = graph.save(graph.sample(stock, positive=positive, negative=positive, steps=2, cfg=2.5))
    latents = others.check(host).latents
    assert difference(latents[others.pairs[4][4]], latents[without]) > 1e-3  # it counts


@pytest.mark.any_host
def test_formats_and_loras(host, folder, chroma):
    """Names of the file and diffusers', and the approximator's; scaled fp8; GGUF against a plain file of its
    values."""
    lora = loras.write(
        host.base / "models/loras", "chroma", loras.chroma_names(SMALL_CHROMA.hidden, SMALL_CHROMA.approximator, seed=0)
    )
    both = Comparison()
    graph = both.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 6), "steps": 1}
    patched = [
        graph.node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=0.8)
        for model in (graph.usp(file=chroma), graph.stock(chroma))
    ]
    both.add("LoRA", *(graph.sample(model, **inputs) for model in patched))
    for name, file in (("scaled_metadata", "chroma_fp8.safetensors"), ("gguf_Q8_0", "chroma_Q8_0.gguf")):
        save_file(write(name, folder / chroma, folder / file), folder / f"plain_chroma_{name}.safetensors")
        models = graph.usp(file=file), graph.stock(f"plain_chroma_{name}.safetensors")
        both.add(name, *(graph.sample(model, **inputs) for model in models))
    plain = graph.save(graph.sample(graph.stock(chroma), **inputs))
    latents = both.check(host).latents
    assert difference(latents[both.pairs[0][4]], latents[plain]) > 1e-2
    assert "lora key not loaded" not in host.log_text().rpartition("got prompt")[2]


def test_scales_in_comfyuis_own_spelling(host, folder, chroma):
    """As it saves them, and as later ones than 0.3.64 read them."""
    respelt = {
        key.removesuffix("scale") + "weight" if key.endswith(".scale") else key: tensor
        for key, tensor in load_file(folder / chroma).items()
    }
    save_file(respelt, folder / "chroma_saved.safetensors")
    both = Comparison()
    graph = both.graph
    models = graph.usp(file="chroma_saved.safetensors"), graph.stock(chroma)
    both.add("saved", *(graph.sample(model, positive=prompt(graph, 6), steps=2) for model in models))
    both.check(host)


def test_control(host, chroma):
    """XLabs' kind for FLUX.1 at the same width, and one that adds after all blocks."""
    net = controlnets.write_xlabs(host.base / "models/controlnet")
    control = Comparison()
    graph = control.graph
    plain, other = prompt(graph, 7), prompt(graph, 5)
    whole = graph.node("TestAppliedControl", conditioning=plain, hidden=SMALL_CHROMA.hidden, blocks=0)
    stock, usp = graph.stock(chroma), graph.usp("cpu:2", file=chroma)
    for label, (positive, negative), cfg in (
        ("XLabs", controlnets.applied(graph, net, plain, other), 1.0),
        ("XLabs, cfg", controlnets.applied(graph, net, plain, other, start_percent=0.4), 2.5),
        ("all blocks", (whole, other), 2.5),
    ):
        given = {"positive": positive, "negative": negative, "steps": 2, "cfg": cfg}
        got, want = (graph.sample(model, **given) for model in (usp, stock))
        control.add(label, got, want, STEPPING)
    without = graph.save(graph.sample(stock, positive=plain, negative=other, steps=2))
    latents = control.check(host).latents
    assert difference(latents[control.pairs[0][4]], latents[without]) > 1e-2  # it counts


def refusal(host, graph: Graph) -> str:
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    return refused.value.text


@pytest.mark.any_host
@pytest.mark.parametrize("sampler_name", ["euler", "uni_pc"])
def test_what_chroma_does_not_take_is_refused(host, chroma, sampler_name):
    for change, words in (
        (lambda graph, given: graph.referring(given, (64, 64)), "remove the reference images from the prompt"),
        (lambda graph, given: graph.node("TestMaskedConditioning", conditioning=given), "attention mask"),
    ):
        graph = Graph()
        positive = change(graph, prompt(graph, 6))
        graph.save(graph.sample(graph.usp(file=chroma), positive=positive, steps=2, sampler_name=sampler_name))
        assert words in refusal(host, graph)


@pytest.mark.parametrize("change", ["read key", "patched in the run"])  # where Chroma's blocks are FLUX's
def test_changes_of_blocks_are_refused(host, chroma, change):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp(file=chroma), change=change)
    graph.save(graph.sample(model, positive=prompt(graph, 6), steps=2))
    words = {"read key": "patches_replace: dit", "patched in the run": "DoubleStreamBlock.forward"}
    assert words[change] in refusal(host, graph)
