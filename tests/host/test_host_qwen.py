"""Qwen-Image gives the same latents as stock UNETLoader + KSampler, and refuses what only its variants take."""

import controlnets
import loras
import pytest
import torch
from comfy import PromptFailed
from safetensors.torch import load_file, save_file
from workflows import IN_WORKERS, SMALL_QWEN, STEPPING, Comparison, Graph, difference

pytestmark = [pytest.mark.host, pytest.mark.any_host]

LAYOUTS = (("cpu:1", 1, 1), ("cpu:2", 2, 1), ("cpu:2", 1, 2))


def prompt(graph: Graph, tokens: int):
    return graph.prompt(tokens, tokens, width=SMALL_QWEN.context)


def test_layouts_and_guidance(host, qwen):
    """A size of 5 x 7 patches, whose middle is ComfyUI's own; prompts of two lengths."""
    layouts = Comparison()
    graph = layouts.graph
    stock = graph.stock(qwen)
    inputs = {
        "positive": prompt(graph, 35),
        "negative": prompt(graph, 6),
        "latent_image": graph.empty(112, 80),
    }
    for cfg, steps, under in ((1.0, 2, LAYOUTS[1:2]), (2.5, 1, LAYOUTS)):
        want = graph.sample(stock, cfg=cfg, steps=steps, **inputs)
        for gpus, ulysses, ring in under:
            usp = graph.usp(gpus, ulysses, ring, file=qwen)
            got = graph.sample(usp, cfg=cfg, steps=steps, **inputs)
            layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers")
    layouts.check(host)


def test_shift_odd_sizes_masks_and_stepping(host, qwen):
    """Prompts of one length are evaluated together where ComfyUI steps."""
    others = Comparison()
    graph = others.graph
    positive, same, shorter = prompt(graph, 12), graph.prompt(2, 12, width=SMALL_QWEN.context), prompt(graph, 6)
    stock, usp = graph.stock(qwen), graph.usp("cpu:2", file=qwen)
    shifted = [graph.node("ModelSamplingAuraFlow", model=model, shift=3.1) for model in (usp, stock)]
    odd, masked = graph.empty(8 * 9, 8 * 7), graph.latent(64, 72, 2, masked=True)
    loop = "loop in the workers"
    for label, models, more, where in (
        ("AuraFlow", shifted, {"negative": shorter, "latent_image": odd}, loop),
        ("masked", (usp, stock), {"negative": same, "latent_image": masked, "denoise": 0.7, "cfg": 1.0}, loop),
        ("stepping", (usp, stock), {"negative": same, "latent_image": odd, "sampler_name": "uni_pc"}, STEPPING),
        ("stepping, two lengths", (usp, stock), {"negative": shorter, "sampler_name": "uni_pc"}, STEPPING),
    ):
        inputs = {"positive": positive, "steps": 2, "cfg": 2.5} | more
        got, want = (graph.sample(model, **inputs) for model in models)
        others.add(label, got, want, where)
    others.check(host)


def test_loras(host, qwen):
    folder = host.base / "models/loras"
    names = [loras.write(folder, f"qwen{i}", loras.qwen_names(SMALL_QWEN.hidden, seed=i)) for i in range(2)]
    loras.check_stack(host, qwen, names, "cpu:1", lambda graph: prompt(graph, 6))


REFERENCES = ((48, 80), (72, 56))


def test_references(host, qwen):
    """Qwen-Image-Edit's, as the host's node says and as the model has it by itself."""
    edit = Comparison()
    graph = edit.graph
    stock, usp = graph.stock(qwen), graph.usp("cpu:2", file=qwen)
    plain, other = prompt(graph, 7), prompt(graph, 5)
    two, one = (graph.referring(plain, *REFERENCES[:count], framed=True) for count in (2, 1))
    beside = graph.referring(plain, *REFERENCES, method="offset", framed=True)
    area = graph.node("ConditioningSetArea", conditioning=one, width=64, height=64, x=8, y=32, strength=1.0)
    combined = graph.node("ConditioningCombine", conditioning_1=area, conditioning_2=other)
    loop = "loop in the workers"
    for label, inputs, where in (
        ("index", {"positive": two, "steps": 2}, loop),
        ("offset", {"positive": beside}, loop),
        ("cfg, one and none", {"positive": one, "negative": other, "cfg": 2.5}, loop),
        ("stepping", {"positive": two, "sampler_name": "uni_pc", "steps": 2}, STEPPING),
        ("area", {"positive": combined}, STEPPING),
    ):
        inputs = {"steps": 1, "latent_image": graph.empty(72, 112), "negative": other} | inputs
        got, want = (graph.sample(model, **inputs) for model in (usp, stock))
        edit.add(label, got, want, where)
    edit.check(host)


def test_control_nets(host, qwen, qwen_control_net):
    """One, and a second one for the last step alone."""
    net, control = qwen_control_net, Comparison()
    graph = control.graph
    stock, usp = graph.stock(qwen), graph.usp("cpu:2", file=qwen)
    plain, other = prompt(graph, 7), prompt(graph, 5)
    common = {"vae": "framed", "strength": 0.5}
    one = controlnets.applied(graph, net, plain, other, **common)
    two = controlnets.applied(graph, net, *one, start_percent=0.4, **common)
    inputs = {"steps": 2, "latent_image": graph.empty(80, 112)}
    for label, (positive, negative), cfg in (("one", one, 1.0), ("two, cfg", two, 2.5)):
        given = inputs | {"positive": positive, "negative": negative, "cfg": cfg}
        got, want = (graph.sample(model, **given) for model in (usp, stock))
        control.add(label, got, want, STEPPING)
    short = inputs | {"steps": 1, "negative": other}
    runs = [graph.save(graph.sample(stock, **short, positive=p)) for p in (plain, one[0])]
    latents = control.check(host).latents
    assert difference(*(latents[run] for run in runs)) > 1e-2  # it counts


def skip_old(host, what: str) -> None:
    """Skips on a ComfyUI from before Qwen-Image-Edit 2511."""
    if "index_timestep_zero" not in str(host.get("/object_info/FluxKontextMultiReferenceLatentMethod")):
        pytest.skip(f"this ComfyUI {what}")


def test_a_control_net_that_needs_the_models_weights_is_refused(host, qwen):
    skip_old(host, "knows no Fun ControlNets")
    graph, net = Graph(), controlnets.write_qwen_fun(host.base / "models/controlnet")
    positive, negative = controlnets.applied(graph, net, prompt(graph, 6), prompt(graph, 6), vae="framed")
    graph.save(graph.sample(graph.usp(file=qwen), positive=positive, negative=negative, steps=2))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "needs the model's own weights (Qwen-Image Fun)" in refused.value.text


def test_references_at_timestep_zero(host, qwen):
    """Where a node says so, and where the file does (Qwen-Image-Edit 2511); and images before the first."""
    skip_old(host, "does not know references at timestep 0")
    path = host.base / "models/diffusion_models/edit.safetensors"
    save_file(load_file(path.parent / qwen) | {"__index_timestep_zero__": torch.empty(0)}, path)
    edit = Comparison()
    graph = edit.graph
    plain, other = prompt(graph, 7), prompt(graph, 5)
    by_file = graph.referring(plain, *REFERENCES, framed=True)
    by_node = graph.referring(plain, *REFERENCES, method="index_timestep_zero", framed=True)
    before = graph.node("TestReferenceMethod", conditioning=by_file, method="negative_index")
    batch = graph.latent(72, 112, 2)
    for label, file, inputs in (
        ("file", path.name, {"positive": by_file, "latent_image": batch}),
        ("file, stepping", path.name, {"positive": by_file, "sampler_name": "uni_pc", "steps": 2}),
        ("node", qwen, {"positive": by_node}),
        ("negative", qwen, {"positive": before}),
    ):
        inputs = {"steps": 1, "latent_image": graph.empty(72, 112), "negative": other} | inputs
        where = STEPPING if "sampler_name" in inputs else "loop in the workers"
        got, want = (graph.sample(m, **inputs) for m in (graph.usp("cpu:2", 1, 2, file=file), graph.stock(file)))
        edit.add(label, got, want, where)
    try:
        edit.check(host)
    finally:
        path.unlink()


def test_layers_are_refused(host, qwen):
    graph = Graph()
    if "EmptyQwenImageLayeredLatentImage" not in host.get("/object_info"):
        pytest.skip("this ComfyUI has no layered latents")
    layered = graph.node("EmptyQwenImageLayeredLatentImage", width=64, height=64, layers=2, batch_size=1)
    inputs = {"positive": prompt(graph, 6), "negative": prompt(graph, 6), "latent_image": layered, "steps": 2}
    graph.save(graph.sample(graph.usp(file=qwen), **inputs))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "3 layers: Qwen-Image-Layered" in refused.value.text


def test_a_mask_of_ones_is_none(host, qwen):
    both = Comparison()
    graph = both.graph
    masked = graph.node("TestMaskedConditioning", conditioning=prompt(graph, 6), effective=False)
    for name in ("euler", "uni_pc"):
        inputs = {"positive": masked, "negative": masked, "steps": 2, "sampler_name": name}
        got, want = (graph.sample(model, **inputs) for model in (graph.usp(file=qwen), graph.stock(qwen)))
        both.add(name, got, want, "loop in the workers" if name == "euler" else STEPPING)
    both.check(host)


def test_masks_of_a_texts_end(host, qwen):
    """Of integers, as ComfyUI's text encoder gives one where a prompt holds its end's token, and added ones; stepping,
    two prompts of one length are evaluated together, whatever is hidden of them."""
    skip_old(host, "drops the attention masks of Qwen-Image's prompts")
    both = Comparison()
    graph = both.graph
    stock, usp = graph.stock(qwen), graph.usp("cpu:2", file=qwen)

    def masked(digits: str, **kind: bool):
        plain = prompt(graph, len(digits))
        return graph.node("TestMaskedConditioning", conditioning=plain, digits=digits, **kind)

    five, two, all_of_it = masked("111110000"), masked("110000000"), prompt(graph, 9)
    added = masked("111110000", added=True)
    uni_pc = {"sampler_name": "uni_pc", "steps": 2}
    edit = [graph.referring(given, (48, 80), framed=True) for given in (five, two)]
    for label, where, inputs in (
        ("loop", IN_WORKERS, {"positive": five, "negative": two}),
        ("loop, batch", IN_WORKERS, {"positive": five, "negative": all_of_it, "latent_image": graph.empty(72, 56, 2)}),
        ("loop, added", IN_WORKERS, {"positive": added, "negative": all_of_it}),
        ("stepping", STEPPING, {"positive": five, "negative": two, **uni_pc}),
        ("stepping, added", STEPPING, {"positive": added, "negative": all_of_it, **uni_pc}),
        ("references", STEPPING, {"positive": edit[0], "negative": edit[1], **uni_pc}),
    ):
        inputs = {"cfg": 2.5, "steps": 1, "latent_image": graph.empty(72, 112)} | inputs
        got, want = (graph.sample(model, **inputs) for model in (usp, stock))
        both.add(label, got, want, where)
    inputs = {"cfg": 2.5, "steps": 1, "latent_image": graph.empty(72, 112), "negative": two}
    whole = graph.save(graph.sample(stock, positive=all_of_it, **inputs))
    latents = both.check(host).latents
    assert difference(latents[both.pairs[0][4]], latents[whole]) > 1e-3  # it counts


def test_hidden_texts_and_a_control_net(host, qwen, qwen_control_net):
    """The ControlNet is ComfyUI's, and sees the whole text."""
    skip_old(host, "drops the attention masks of Qwen-Image's prompts")
    control = Comparison()
    graph = control.graph
    masked = [
        graph.node("TestMaskedConditioning", conditioning=prompt(graph, 9), digits=digits)
        for digits in ("111110000", "110000000")
    ]
    positive, negative = controlnets.applied(graph, qwen_control_net, *masked, vae="framed", strength=0.5)
    inputs = {"positive": positive, "negative": negative, "cfg": 2.5, "steps": 1, "latent_image": graph.empty(80, 112)}
    got, want = (graph.sample(m, **inputs) for m in (graph.usp("cpu:2", file=qwen), graph.stock(qwen)))
    control.add("hidden", got, want, STEPPING)
    control.check(host)


@pytest.mark.parametrize("sampler_name", ["euler", "uni_pc"])
@pytest.mark.parametrize("digits", ["", "110111", "011111", "000000"])
def test_other_attention_masks_are_refused(host, qwen, digits, sampler_name):
    """One that weights, one with a hole, one of a text's beginning, and one of all of it."""
    skip_old(host, "drops the attention masks of Qwen-Image's prompts")
    graph = Graph()
    masked = graph.node("TestMaskedConditioning", conditioning=prompt(graph, 6), digits=digits)
    inputs = {"positive": masked, "negative": prompt(graph, 6), "steps": 2, "sampler_name": sampler_name}
    graph.save(graph.sample(graph.usp(file=qwen), **inputs))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert "attention mask that hides more than the end of a text" in refused.value.text
