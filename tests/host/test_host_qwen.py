"""Qwen-Image gives the same latents as stock UNETLoader + KSampler, and refuses what only its variants take."""

from dataclasses import replace

import loras
import pytest
import torch
from comfy import PromptFailed
from workflows import STEPPING, Comparison, Graph

from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_qwen_image

pytestmark = [pytest.mark.host, pytest.mark.any_host]

# ComfyUI takes every Qwen-Image for one of this width; in bf16, which CPU ranks and ComfyUI alike compute in float32.
FULL_WIDTH = replace(TINY_QWEN_IMAGE, hidden=3072, heads=24, mlp=12288)
LAYOUTS = (("cpu:1", 1, 1), ("cpu:2", 2, 1), ("cpu:2", 1, 2))


@pytest.fixture(scope="module")
def qwen(host):
    path = host.base / "models/diffusion_models/qwen.safetensors"
    write_qwen_image(str(path), FULL_WIDTH, dtype=torch.bfloat16)
    yield path.name
    path.unlink()


def prompt(graph: Graph, tokens: int):
    return graph.prompt(tokens, tokens, width=FULL_WIDTH.context)


def test_layouts_and_guidance(host, qwen):
    """A size of 5 x 7 patches, whose middle is ComfyUI's own; prompts of two lengths."""
    layouts = Comparison()
    graph = layouts.graph
    stock = graph.stock(qwen)
    inputs = {
        "positive": prompt(graph, 35),
        "negative": prompt(graph, 6),
        "latent_image": graph.empty(112, 80),
        "steps": 4,
    }
    for cfg in (1.0, 2.5):
        want = graph.sample(stock, cfg=cfg, **inputs)
        for gpus, ulysses, ring in LAYOUTS:
            usp = graph.usp(gpus, ulysses, ring, file=qwen)
            got = graph.sample(usp, cfg=cfg, **inputs)
            layouts.add(f"cfg {cfg}", got, want, f"ulysses {ulysses} x ring {ring} on {gpus}, loop in the workers")
    layouts.check(host)


def test_shift_odd_sizes_masks_and_stepping(host, qwen):
    """Prompts of one length are evaluated together where ComfyUI steps."""
    others = Comparison()
    graph = others.graph
    positive, same, shorter = prompt(graph, 12), graph.prompt(2, 12, width=FULL_WIDTH.context), prompt(graph, 6)
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
        inputs = {"positive": positive, "steps": 3, "cfg": 2.5} | more
        got, want = (graph.sample(model, **inputs) for model in models)
        others.add(label, got, want, where)
    others.check(host)


def test_loras(host, qwen):
    names = [
        loras.write(host.base / "models/loras", f"qwen{i}", loras.qwen_names(FULL_WIDTH.hidden, seed=i))
        for i in range(2)
    ]
    both = Comparison()
    graph = both.graph
    models = []
    for model in (graph.usp("cpu:1", file=qwen, weight_dtype="fp32"), graph.stock(qwen)):  # see test_host_lora
        for name, strength in zip(names, (0.8, -0.4), strict=True):
            model = graph.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
        models.append(model)
    positive = prompt(graph, 6)
    both.add("stack", *(graph.sample(model, positive=positive, negative=positive, steps=3) for model in models))
    both.check(host)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ReferenceLatent", "TextEncodeQwenImageEdit"),
        ("TestAppliedControl", "ControlNet"),
        ("layers", "3 layers: Qwen-Image-Layered"),
    ],
)
def test_what_the_variants_take_is_refused(host, qwen, kind, words):
    graph = Graph()
    positive, inputs = prompt(graph, 6), {}
    if kind == "layers":
        if "EmptyQwenImageLayeredLatentImage" not in host.get("/object_info"):
            pytest.skip("this ComfyUI has no layered latents")
        inputs["latent_image"] = graph.node(
            "EmptyQwenImageLayeredLatentImage", width=64, height=64, layers=2, batch_size=1
        )
    else:
        more = {"latent": graph.latent()} if kind == "ReferenceLatent" else {}
        positive = graph.node(kind, conditioning=positive, **more)
    usp = graph.usp(file=qwen)
    graph.save(graph.sample(usp, positive=positive, negative=prompt(graph, 6), steps=2, **inputs))
    with pytest.raises(PromptFailed) as refused:
        host.run(graph)
    assert words in refused.value.text
