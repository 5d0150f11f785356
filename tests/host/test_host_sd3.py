"""Stable Diffusion 3 gives the same latents as stock UNETLoader + KSampler, with Skip Layer Guidance as well."""

from dataclasses import replace

import controlnets
import loras
import pytest
from comfy import PromptFailed
from formats import write
from hosts import knows_small_flux
from safetensors.torch import save_file
from workflows import IN_WORKERS, STEPPING, Comparison, Graph, difference

from fastusp_backend.models.synthetic import TINY_SD3, write_checkpoint

pytestmark = [pytest.mark.host, pytest.mark.any_host]

LAYOUTS = {1.0: (("cpu:1", 1, 1), ("cpu:2", 1, 2)), 4.5: (("cpu:1", 1, 1), ("cpu:2", 2, 1))}
"""By cfg."""


def prompt(graph: Graph, tokens: int, seed: int = 1):
    return graph.prompt(seed, tokens, width=TINY_SD3.context, pooled=TINY_SD3.pooled)


def test_layouts_and_guidance(host, sd3):
    """A size of 5 x 7 patches, whose positions lie in the middle; prompts of two lengths."""
    layouts = Comparison()
    graph = layouts.graph
    stock = graph.stock(sd3)
    inputs = {"positive": prompt(graph, 154), "negative": prompt(graph, 77), "latent_image": graph.empty(112, 80)}
    for cfg, among in LAYOUTS.items():
        want = graph.sample(stock, cfg=cfg, steps=3, **inputs)
        for gpus, ulysses, ring in among:
            got = graph.sample(graph.usp(gpus, ulysses, ring, file=sd3), cfg=cfg, steps=3, **inputs)
            layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers")
    got = graph.sample(graph.usp("cpu:2", file=sd3), cfg=cfg, steps=3, **inputs)
    layouts.add("a prompt for each", got, want, "batch 2 x ulysses 1 x ring 1 on cpu:2, loop in the workers")
    layouts.check(host)


@pytest.mark.parametrize("name, kind", [("large", {}), ("3_medium", {"normed": False})])
def test_without_second_attentions(host, name, kind):
    """In the loop and stepping; 3 medium norms no queries and keys either."""
    path = host.base / f"models/diffusion_models/sd_{name}.safetensors"
    write_checkpoint(str(path), replace(TINY_SD3, second_attentions=0, **kind), seed=2)
    both = Comparison()
    graph = both.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 12, seed=2), "latent_image": graph.empty(72, 56)}
    usp, stock = graph.usp("cpu:2", 2, 1, file=path.name), graph.stock(path.name)
    for sampler, where in (("euler", IN_WORKERS), ("uni_pc", STEPPING)):
        got, want = (graph.sample(m, steps=2, cfg=2.5, sampler_name=sampler, **inputs) for m in (usp, stock))
        both.add(sampler, got, want, where)
    try:
        both.check(host)
    finally:
        path.unlink()


def test_shift_odd_sizes_masks_and_stepping(host, sd3):
    """Prompts of one length are evaluated together where ComfyUI steps."""
    others = Comparison()
    graph = others.graph
    positive, same, shorter = prompt(graph, 12), prompt(graph, 12, seed=2), prompt(graph, 6)
    stock, usp = graph.stock(sd3), graph.usp("cpu:2", file=sd3)
    shifted = [graph.node("ModelSamplingSD3", model=model, shift=5.0) for model in (usp, stock)]
    odd, masked = graph.latent(8 * 9, 8 * 7), graph.latent(64, 72, 2, masked=True)
    for label, models, more, where in (
        ("shift", shifted, {"negative": shorter, "latent_image": odd}, IN_WORKERS),
        ("masked", (usp, stock), {"negative": same, "latent_image": masked, "denoise": 0.7}, IN_WORKERS),
        ("stepping", (usp, stock), {"negative": same, "latent_image": odd, "sampler_name": "uni_pc"}, STEPPING),
        ("stepping, two lengths", (usp, stock), {"negative": shorter, "sampler_name": "uni_pc"}, STEPPING),
    ):
        inputs = {"positive": positive, "steps": 3, "cfg": 2.5} | more
        got, want = (graph.sample(model, **inputs) for model in models)
        others.add(label, got, want, where)
    others.check(host)


def test_skip_layer_guidance(host, sd3):
    """ComfyUI's three nodes, for some of the steps; blocks that there are not, and single ones, mean nothing."""
    guided = Comparison()
    graph = guided.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 12, seed=2), "cfg": 3.0, "steps": 4}
    inputs["latent_image"] = graph.empty(80, 72)
    pair = graph.usp("cpu:2", file=sd3), graph.stock(sd3)
    for kind, options in (
        ("SkipLayerGuidanceSD3", {"layers": "1, 2, 7", "start_percent": 0.01, "end_percent": 0.6}),
        ("SkipLayerGuidanceDiT", {"double_layers": "0, 3", "single_layers": "1", "rescaling_scale": 0.5}),
        ("SkipLayerGuidanceDiTSimple", {"double_layers": "1", "single_layers": "1"}),
    ):
        if kind not in host.get("/object_info"):
            continue  # ComfyUI brought it later
        more = {"start_percent": 0.0, "end_percent": 1.0} | ({} if kind.endswith("Simple") else {"scale": 2.8})
        got, want = (graph.sample(graph.node(kind, model=m, **more | options), **inputs) for m in pair)
        guided.add(kind, got, want, STEPPING)
    plain = graph.save(graph.sample(pair[1], **inputs))
    latents = guided.check(host).latents
    for label, _, _, _, want in guided.pairs:
        assert difference(latents[want], latents[plain]) > 1e-2, label  # it counts


def test_blocks_left_out_for_good(host, sd3):
    both = Comparison()
    graph = both.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 6), "cfg": 3.0, "steps": 3}
    plain = graph.usp("cpu:2", file=sd3), graph.stock(sd3)
    changed = [graph.node("TestChangedModel", model=model, change="left out") for model in plain]
    got, want = (graph.sample(model, **inputs) for model in changed)
    both.add("left out", got, want, "stepping (blocks are left out")
    without = graph.save(graph.sample(plain[1], **inputs))
    latents = both.check(host).latents
    assert difference(latents[both.pairs[0][4]], latents[without]) > 1e-2


def test_other_changes_of_blocks_are_refused(host, sd3):
    graph = Graph()
    model = graph.node("TestChangedModel", model=graph.usp(file=sd3), change="read key")
    graph.save(graph.sample(model, positive=prompt(graph, 6), negative=prompt(graph, 6), steps=2))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "patch inside the transformer (patches_replace: dit)" in refused.value.text


def test_loras(host, sd3):
    folder = host.base / "models/loras"
    names = [loras.write(folder, f"sd3{i}", loras.sd3_names(TINY_SD3.hidden, seed=i)) for i in range(2)]
    loras.check_stack(host, sd3, names, "cpu:2", lambda graph: prompt(graph, 6), steps=2)


def test_formats(host, sd3):
    """Each gives what stock gives for a plain file of the same values; stock reads the scaled one itself, too."""
    folder, made = host.base / "models/diffusion_models", []
    formats = Comparison()
    graph = formats.graph
    inputs = {"positive": prompt(graph, 12), "negative": prompt(graph, 6), "steps": 1, "cfg": 2.0}
    inputs["latent_image"] = graph.empty(72, 56)
    for name, file in (
        ("fp8_e4m3fn", "sd3_fp8.safetensors"),
        ("scaled_old_prefixed", "sd3_scaled.safetensors"),
        ("gguf_Q8_0", "sd3.gguf"),
        ("all_in_one", "../checkpoints/sd3_all.safetensors"),
    ):
        path, plain = folder / file, folder / f"plain_{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(write(name, folder / sd3, path), plain)
        made += path, plain
        listed = f"{path.name} [checkpoints]" if name == "all_in_one" else file
        got = graph.sample(graph.usp(file=listed), **inputs)
        formats.add(name, got, graph.sample(graph.stock(plain.name), **inputs))
        if name == "scaled_old_prefixed" and knows_small_flux(host.path):  # older ones leave its convolution unscaled
            formats.add(f"{name}, file", got, graph.sample(graph.stock(file), **inputs))
    try:
        formats.check(host)
    finally:
        for path in made:
            path.unlink()


def test_control_nets(host, sd3):
    """One of fewer blocks than the model's, and a second one for the last step alone."""
    models = host.base / "models"
    net = controlnets.write_sd3(models / "controlnet")
    control = Comparison()
    graph = control.graph
    stock, usp = graph.stock(sd3), graph.usp("cpu:2", file=sd3)
    plain, other = prompt(graph, 7), prompt(graph, 5)
    one = controlnets.applied(graph, net, plain, other, vae="image", strength=0.5)
    two = controlnets.applied(graph, net, *one, vae="image", strength=0.5, start_percent=0.4)
    inputs = {"steps": 2, "latent_image": graph.empty(80, 112)}
    for label, (positive, negative), cfg in (("one", one, 1.0), ("two, cfg", two, 2.5)):
        given = inputs | {"positive": positive, "negative": negative, "cfg": cfg}
        got, want = (graph.sample(model, **given) for model in (usp, stock))
        control.add(label, got, want, STEPPING)
    without = graph.save(graph.sample(stock, positive=plain, negative=other, **inputs))
    latents = control.check(host).latents
    assert difference(latents[control.pairs[0][4]], latents[without]) > 1e-2  # it counts


def test_a_control_net_that_needs_the_models_weights_is_refused(host, sd3):
    graph, net = Graph(), controlnets.write_sd35(host.base / "models/controlnet")
    positive, negative = controlnets.applied(graph, net, prompt(graph, 6), prompt(graph, 6), vae="image")
    graph.save(graph.sample(graph.usp(file=sd3), positive=positive, negative=negative, steps=2))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "needs the model's own weights (Stability's for 3.5 large)" in refused.value.text
