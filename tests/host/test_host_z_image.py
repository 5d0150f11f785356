"""Z-Image gives the same latents as stock UNETLoader + KSampler, and refuses what only its variants take."""

import loras
import pytest
from comfy import PromptFailed
from safetensors.torch import load_file, save_file
from workflows import IN_WORKERS, SMALL_Z_IMAGE, STEPPING, Comparison, Graph, difference

pytestmark = pytest.mark.host

LAYOUTS = (("cpu:1", 1, 1), ("cpu:2", 2, 1), ("cpu:2", 1, 2), ("cpu:4", 2, 2))


def prompt(graph: Graph, tokens: int, seed: int = 1):
    return graph.prompt(seed, tokens, width=SMALL_Z_IMAGE.context)


def test_layouts_and_guidance(host, z_image):
    """35 patches and prompts of two lengths, none of which 32 divides; Turbo's cfg, and Base's."""
    layouts = Comparison()
    graph = layouts.graph
    stock = graph.stock(z_image)
    inputs = {"positive": prompt(graph, 35), "negative": prompt(graph, 6), "latent_image": graph.empty(112, 80)}
    for cfg, steps, under in ((1.0, 2, LAYOUTS[:2]), (3.0, 1, LAYOUTS[1:])):
        inputs |= {"cfg": cfg, "steps": steps, "sampler_name": "res_multistep"}
        want = graph.sample(stock, **inputs)
        for gpus, ulysses, ring in under:
            got = graph.sample(graph.usp(gpus, ulysses, ring, file=z_image), **inputs)
            layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers")
    got = graph.sample(graph.usp("cpu:2", file=z_image), **inputs)
    layouts.add("a prompt for each", got, want, "batch 2 x ulysses 1 x ring 1 on cpu:2, loop in the workers")
    layouts.check(host)


def test_shift_odd_sizes_masks_and_stepping(host, z_image):
    """Prompts of one length are evaluated together where ComfyUI steps."""
    others = Comparison()
    graph = others.graph
    positive, same, shorter = prompt(graph, 32), prompt(graph, 32, seed=2), prompt(graph, 6)
    stock, usp = graph.stock(z_image), graph.usp("cpu:2", file=z_image)
    shifted = [graph.node("ModelSamplingAuraFlow", model=model, shift=5.0) for model in (usp, stock)]
    odd, masked = graph.latent(8 * 9, 8 * 7), graph.latent(64, 72, 2, masked=True)
    for label, models, more, where in (
        ("AuraFlow", shifted, {"negative": shorter, "latent_image": odd}, IN_WORKERS),
        ("masked", (usp, stock), {"negative": same, "latent_image": masked, "denoise": 0.7, "cfg": 1.0}, IN_WORKERS),
        ("stepping", (usp, stock), {"negative": same, "latent_image": odd, "sampler_name": "uni_pc"}, STEPPING),
        ("stepping, two lengths", (usp, stock), {"negative": shorter, "sampler_name": "uni_pc"}, STEPPING),
    ):
        inputs = {"positive": positive, "steps": 2, "cfg": 2.5} | more
        got, want = (graph.sample(model, **inputs) for model in models)
        others.add(label, got, want, where)
    others.check(host)


@pytest.mark.parametrize("digits", ["111110000", "110111011"])
def test_masks_have_no_effect(host, z_image, digits):
    """As in ComfyUI, which makes nothing of them."""
    both = Comparison()
    graph = both.graph
    masked = graph.node("TestMaskedConditioning", conditioning=prompt(graph, len(digits)), digits=digits)
    for name, where in (("euler", IN_WORKERS), ("uni_pc", STEPPING)):
        inputs = {"positive": masked, "negative": prompt(graph, 9), "cfg": 2.5, "steps": 2, "sampler_name": name}
        got, want = (graph.sample(m, **inputs) for m in (graph.usp("cpu:2", file=z_image), graph.stock(z_image)))
        both.add(name, got, want, where)
    both.check(host)


def test_loras(host, z_image):
    folder, sizes = host.base / "models/loras", (SMALL_Z_IMAGE.hidden, SMALL_Z_IMAGE.mlp)
    names = [loras.write(folder, f"z{i}", loras.z_image_names(*sizes, seed=i)) for i in range(2)]
    loras.check_stack(host, z_image, names, "cpu:2", lambda graph: prompt(graph, 6))


def test_float16_whose_range_products_leave(host, z_image):
    """As Model Compute Dtype has it. What comes out beyond its largest value is that value, in the workers as in
    stock."""
    path = host.base / "models/diffusion_models/z_image_large.safetensors"
    large = (".qkv.weight", ".out.weight", ".w1.weight", ".w3.weight")
    state = load_file(path.with_name(z_image))
    for name, tensor in state.items():
        if name.endswith(large) and not name.startswith("context_refiner"):
            tensor *= 300
    save_file(state, path)
    graph, runs = Graph(), {}
    usp, stock = graph.usp("cpu:2", file=path.name), graph.stock(path.name)
    for name, model, dtype in (("usp", usp, "fp16"), ("stock", stock, "fp16"), ("wide", stock, "fp32")):
        computing = graph.node("ModelComputeDtype", model=model, dtype=dtype)
        runs[name] = graph.save(graph.sample(computing, positive=prompt(graph, 6), steps=2))
    latents = host.run(graph).latents
    assert difference(latents[runs["stock"]], latents[runs["wide"]]) > 0.1
    assert difference(latents[runs["usp"]], latents[runs["stock"]]) < 0.01


def test_what_only_variants_take_is_refused(host, z_image):
    graph = Graph()
    positive = graph.referring(prompt(graph, 6), (64, 64))
    graph.save(graph.sample(graph.usp("cpu:2", file=z_image), positive=positive, negative=positive, steps=1))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "Remove the images from the prompt" in refused.value.text and "(Z-Image Omni)" in refused.value.text


def test_a_control_net_is_refused(host, z_image):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp("cpu:2", file=z_image), change="refiner patch")
    graph.save(graph.sample(model, positive=prompt(graph, 6), negative=prompt(graph, 6), steps=1))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "patch inside the transformer (patches: noise_refiner)" in refused.value.text
