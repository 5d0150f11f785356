"""LoRAs through ComfyUI's own nodes: the same latents as stock, changed and taken off without a trace."""

import re

import loras
import pytest
from comfy import ComfyUI, PromptFailed
from formats import write
from safetensors.torch import save_file
from workflows import DEV, IN_WORKERS, STEPPING, Comparison, Graph, Link

pytestmark = pytest.mark.host
THOROUGH = pytest.mark.thorough

Stack = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def files(host) -> dict[str, str]:
    """LoRAs for the host's model, by kind."""
    mlp, hidden = loras.shapes(host.base / "models/diffusion_models" / DEV)
    folder = host.base / "models/loras"
    kinds = {"bfl": loras.bfl_names, "diffusers": loras.diffusers_names, "kinds": loras.all_kinds}
    made = {name: make(hidden, mlp, seed) for seed, (name, make) in enumerate(kinds.items())}
    made["control"] = loras.control(host.base / "models/diffusion_models" / DEV)
    return {name: loras.write(folder, name, tensors) for name, tensors in made.items()}


def loaded(graph: Graph, model: Link, files: dict[str, str], stack: Stack) -> Link:
    for name, strength in stack:
        model = graph.node("LoraLoaderModelOnly", model=model, lora_name=files[name], strength_model=strength)
    return model


def latents(host: ComfyUI, files, stack: Stack, *, rerun: bool = False, **inputs):
    """A run with USP Loader. rerun: with another way to say the same layout, which ComfyUI has not cached."""
    graph = Graph()
    model = graph.usp("cpu:2", *((2, 1) if rerun else (0, 0)))
    saved = graph.save(graph.sample(loaded(graph, model, files, stack), **inputs))
    return host.run(graph).latents[saved]


def test_loras_as_in_stock(host, files):
    """Each file, and stacks of them, in both paths; alternating in one prompt."""
    both, began = Comparison(), len(host.log_text())
    graph = both.graph
    usp, stock = graph.usp(), graph.stock()
    for stack, sampler, where in (
        ((("bfl", 0.8),), "euler", IN_WORKERS),
        ((("diffusers", 1.0),), "euler", IN_WORKERS),
        ((("kinds", 0.7),), "euler", IN_WORKERS),
        ((("bfl", 0.8), ("diffusers", -0.35)), "euler", IN_WORKERS),
        ((("bfl", 0.5), ("kinds", 1.0), ("bfl", -0.25)), "uni_pc", STEPPING),
    ):
        got, want = (graph.sample(loaded(graph, x, files, stack), steps=2, sampler_name=sampler) for x in (usp, stock))
        both.add(str(stack), got, want, where)
    both.check(host)
    left_out = re.findall(r"(ERROR lora|weight patch out:) (\S+?):? ", host.log_text()[began:])
    misfit = "diffusion_model.double_blocks.0.txt_mlp.0.weight"
    assert set(left_out) == {("ERROR lora", misfit), ("weight patch out:", misfit)}
    unknown = set(re.findall(r"lora key not loaded: (\S+)", host.log_text()[began:]))
    assert unknown == {"diffusion_model.double_blocks.99.txt_mlp.0.diff_b"}


def test_a_lora_is_taken_off_without_a_trace(host, files):
    inputs = {"steps": 3, "seed": 31}
    plain = latents(host, files, (), **inputs)
    one = latents(host, files, (("bfl", 1.0),), **inputs)
    other = latents(host, files, (("bfl", -0.5),), **inputs)
    assert not one.equal(plain) and not other.equal(one)
    pids = host.pool("cpu:2")["pids"]
    assert latents(host, files, (), rerun=True, **inputs).equal(plain)
    assert latents(host, files, (("bfl", 1.0),), rerun=True, **inputs).equal(one)
    assert host.pool("cpu:2")["pids"] == pids


def showing(graph: Graph, image: Link, seed: int = 1) -> Link:
    """A prompt with an image for Canny or Depth."""
    mask = graph.node("SolidMask", value=1.0, width=64, height=64)
    return graph.node("TestInpaintConditioning", conditioning=graph.prompt(seed), latent=image, mask=mask)


def test_a_lora_that_makes_a_control_model(host, files):
    """It widens the image's input: with an image and without one, stacked, and beside runs without it."""
    both = Comparison()
    graph = both.graph
    usp, stock, image = graph.usp(), graph.stock(), graph.latent(64, 96)
    positive, negative = showing(graph, image), showing(graph, image, 2)
    one, stacked = (("control", 1.0),), (("kinds", 0.5), ("control", 0.6), ("bfl", 0.8), ("control", -0.2))
    for stack, inputs, where in (
        (one, {"positive": positive}, IN_WORKERS),
        ((), {"positive": positive}, IN_WORKERS),
        (stacked, {"positive": positive, "negative": negative, "cfg": 2.0}, IN_WORKERS),
        (one, {}, IN_WORKERS),
        (stacked, {"positive": positive, "sampler_name": "uni_pc"}, STEPPING),
        ((), {"positive": positive, "sampler_name": "uni_pc"}, STEPPING),
    ):
        got, want = (graph.sample(loaded(graph, x, files, stack), steps=2, **inputs) for x in (usp, stock))
        both.add(f"{stack}, {sorted(inputs)}", got, want, where)
    both.check(host)


def test_a_control_model_is_a_plain_one_again(host, files):
    inputs = {"steps": 2, "seed": 32}
    plain = latents(host, files, (), **inputs)
    control = latents(host, files, (("control", 1.0),), **inputs)
    pids = host.pool("cpu:2")["pids"]
    assert not control.equal(plain) and latents(host, files, (), rerun=True, **inputs).equal(plain)
    assert latents(host, files, (("control", 1.0),), rerun=True, **inputs).equal(control)
    assert host.pool("cpu:2")["pids"] == pids


def test_a_scaled_fp8_file(host, files):
    """Its names are those of a plain file; converted when it is loaded, it takes a LoRA as that does."""
    folder = host.base / "models/diffusion_models"
    paths = folder / "fp8_lora.safetensors", folder / "fp8_values.safetensors"
    save_file(write("scaled_metadata", folder / DEV, paths[0]), paths[1])
    both = Comparison()
    graph = both.graph
    usp, stock = graph.usp(file=paths[0].name, weight_dtype="fp32"), graph.stock(paths[1].name)
    stack = (("bfl", 0.8), ("diffusers", -0.35))
    got, want = (graph.sample(loaded(graph, x, files, stack), steps=2) for x in (usp, stock))
    both.add("scaled fp8", got, want)
    try:
        both.check(host)
    finally:
        for path in paths:
            path.unlink()


@pytest.mark.parametrize(
    "form, name", [("gguf_Q4_K", "lora.gguf"), pytest.param("nvfp4", "lora_nvfp4.safetensors", marks=THOROUGH)]
)
def test_packed_weights(host, files, form, name):
    """A file whose weights stay packed, against stock with a plain file of the same values."""
    folder = host.base / "models"
    paths = folder / "diffusion_models" / name, folder / "diffusion_models/lora_values.safetensors"
    save_file(write(form, folder / "diffusion_models" / DEV, paths[0]), paths[1])
    mlp, hidden = loras.shapes(paths[1])
    packed = {name: t for name, t in loras.diffusers_names(hidden, mlp, 5).items() if "blocks" in name}
    stack = (("bfl", 0.8), ("packed", -0.35))
    names = files | {"packed": loras.write(folder / "loras", "packed", packed)}
    both, refused = Comparison(), Graph()
    graph = both.graph
    usp, stock = graph.usp(file=paths[0].name), graph.stock(paths[1].name)
    for given, sampler, where in ((stack, "euler", IN_WORKERS), (stack[1:], "uni_pc", STEPPING)):
        got, want = (graph.sample(loaded(graph, x, names, given), steps=2, sampler_name=sampler) for x in (usp, stock))
        both.add(f"packed, {given}", got, want, where)
    kinds = loaded(refused, refused.usp(file=paths[0].name), files, (("kinds", 1.0),))
    refused.save(refused.sample(kinds))
    try:
        both.check(host)
        with pytest.raises(
            PromptFailed, match="packed weights take plain LoRAs alone, not .* patches; set weight_dtype"
        ):
            host.run(refused)
    finally:
        for path in paths:
            path.unlink()


@pytest.mark.any_host
@pytest.mark.parametrize(
    "forms",
    [("fp8_e4m3fn", "scaled_metadata"), pytest.param(("fp8_e5m2", "scaled_old", "scaled_tensors"), marks=THOROUGH)],
    ids=" ".join,
)
def test_weights_that_stay_in_fp8(host, files, tmp_path, forms):
    """ComfyUI rounds them at random, ours to the nearest: they differ by one unit at most, see pack/patched_fp8.py."""
    source, graph = host.base / "models/diffusion_models" / DEV, Graph()
    stack = files
    if loras.shapes(source)[1] > 512:  # an older host, which reads no newer form
        forms, stack = ("scaled_old",), ("bfl",)
    given = "\n".join(str(host.base / "models/loras" / files[name]) for name in stack)
    for form in forms:
        path = tmp_path / f"{form}.safetensors"
        write(form, source, path)
        graph.node("TestPatchedFP8", file=str(path), loras=given)
    host.run(graph)


@pytest.mark.any_host
def test_every_kind_on_every_host(host, files):
    """In fp32: on a CPU, ComfyUI keeps the weights of a bf16 file so, and does not round what it has patched."""
    both = Comparison()
    graph = both.graph
    usp, stock = graph.usp("cpu:1", weight_dtype="fp32"), graph.stock()
    for stack in ((("bfl", 0.8), ("diffusers", 0.5), ("kinds", -0.7)), (("bfl", 0.8), ("control", 0.5))):
        got, want = (graph.sample(loaded(graph, x, files, stack), steps=2) for x in (usp, stock))
        both.add(str(stack), got, want)
    both.check(host)
