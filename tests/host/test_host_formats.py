"""Files in the formats that people have give what stock gives for them, or for a plain file of the same values."""

import pytest
import torch
from formats import write
from safetensors.torch import load_file, save_file
from support import REORDERED
from workflows import DEV, SCHNELL, SMALL, TOLERANCE, Comparison, Graph, difference

from benchmarks.diffusers_weights import to_diffusers
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.host

MARK = " [checkpoints]"
PREFIXES = ("model.model.", "net.", "model.")


@pytest.fixture
def models(host):
    """The folder of diffusion models; what a test adds goes after it."""
    folder = host.base / "models"
    before = set(folder.rglob("*"))
    yield folder / "diffusion_models"
    for path in {path for path in folder.rglob("*") if path.is_file()} - before:
        path.unlink()


def names_of(host) -> list[str]:
    kind, *more = host.get("/object_info/FastUSPLoader")["FastUSPLoader"]["input"]["required"]["unet_name"]
    return more[0]["options"] if kind == "COMBO" else kind


def compare(host, models, names: dict[str, str], *, inputs_too: bool = False) -> list[float]:
    """Formats and their files against a plain float32 file of the same values, and stock with the file it reads. Where
    stock rounds layers' inputs too, returns how far its latents are."""
    formats, rounded = Comparison(), []
    graph = formats.graph
    inputs = {"positive": graph.prompt(), "negative": graph.prompt(2), "latent_image": graph.empty()}
    inputs["steps"] = 6 if inputs_too else 2
    for name, file in names.items():
        save_file(write(name, models / DEV, models / file), models / f"plain_{name}.safetensors")
        got = graph.sample(graph.usp(file=file), **inputs)
        formats.add(f"{name}, values", got, graph.sample(graph.stock(f"plain_{name}.safetensors"), **inputs))
        if inputs_too:
            rounded.append((graph.save(got), graph.save(graph.sample(graph.stock(file), **inputs))))
        elif not file.endswith(".gguf"):
            formats.add(f"{name}, file", got, graph.sample(graph.stock(file), **inputs))
    assert set(names.values()) <= set(names_of(host))
    latents = formats.check(host).latents
    return [difference(latents[got], latents[want]) for got, want in rounded]


def test_fp8(host, models):
    compare(host, models, {name: f"{name}.safetensors" for name in ("fp8_e4m3fn", "scaled_old", "scaled_metadata")})


def test_packed_layers(host, models):
    compare(host, models, {name: f"{name}.safetensors" for name in ("nvfp4", "mxfp8")})


def test_layers_of_integers(host, models):
    """Alone, and among layers of all other formats. Stock rounds these layers' inputs to 8 or 4 bits too, also where
    the file says that it is not to (`full_precision_matrix_mult`)."""
    near = compare(
        host,
        models,
        {name: f"{name}.safetensors" for name in ("int8_convrot", "int4_convrot", "mixed", "mixed_exact")},
        inputs_too=True,
    )
    assert all(TOLERANCE < distance < 0.1 for distance in near) and near[-1] == near[-2], near


def test_gguf(host, models):
    compare(host, models, {name: f"{name}.gguf" for name in ("gguf_Q8_0", "gguf_Q4_K")})


def test_diffusers_layout(host, models):
    state = to_diffusers(load_file(models / DEV), SMALL.hidden)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, models / "diffusers.safetensors")
    both = Comparison()
    graph = both.graph
    got = graph.sample(graph.usp(file="diffusers.safetensors"), steps=4)
    both.add("values", got, graph.sample(graph.stock(), steps=4))
    both.add("file", got, graph.sample(graph.stock("diffusers.safetensors"), steps=4))
    both.check(host)


def test_bf16(host, models):
    """On CPUs both compute it in float32."""
    write_checkpoint(str(models / "bf16.safetensors"), SMALL, dtype=torch.bfloat16)
    both = Comparison()
    graph = both.graph
    both.add("bf16", *(graph.sample(make(file="bf16.safetensors"), steps=4) for make in (graph.usp, graph.stock)))
    both.check(host)


@pytest.mark.any_host
def test_a_plain_file_stored_in_fp8(host):
    stored = Comparison()
    graph = stored.graph
    for dtype in ("fp8_e4m3fn", "fp8_e5m2"):
        want = graph.sample(graph.node("UNETLoader", unet_name=DEV, weight_dtype=dtype), steps=2)
        stored.add(dtype, graph.sample(graph.usp(weight_dtype=dtype), steps=2), want)
    stored.check(host)


def test_all_in_one_checkpoints(host, models):
    """Of the same name as a diffusion model that is another one."""
    whole = models.parent / "checkpoints" / SCHNELL
    whole.parent.mkdir(exist_ok=True)
    write("all_in_one", models / DEV, whole)
    assert names_of(host)[-1] == SCHNELL + MARK and SCHNELL in names_of(host)
    both = Comparison()
    graph = both.graph
    loaded = graph.node("CheckpointLoaderSimple", ckpt_name=SCHNELL)
    got = graph.sample(graph.usp(file=SCHNELL + MARK), steps=2)
    both.add("checkpoint", got, graph.sample(loaded, steps=2))
    both.add("its transformer", got, graph.sample(graph.stock(DEV), steps=2))
    both.add(
        "the other one", graph.sample(graph.usp(file=SCHNELL), steps=2), graph.sample(graph.stock(SCHNELL), steps=2)
    )
    both.check(host)


def test_extra_tensors_and_prefixes(host, models):
    """What no weight needs is left alone, whatever its type; a line in the log says so."""
    state = load_file(models / DEV)
    extra = {"steps": torch.arange(3), "note": torch.ones(2), "vae.decoder.conv_in.weight": torch.ones(4, 3)}
    scaled = write("scaled_metadata", models / DEV, models / "scaled.safetensors")
    files = {
        "extra.safetensors": state | extra,
        **{f"{prefix}safetensors": {prefix + name: t for name, t in state.items()} | extra for prefix in PREFIXES},
        "scaled_values.safetensors": scaled,
    }
    for name, tensors in files.items():
        save_file(tensors, models / name)
    write("scaled_old", models / "net.safetensors", models / "scaled.safetensors")
    both = Comparison()
    graph = both.graph
    want = graph.sample(graph.stock(DEV), steps=2)
    for name in ("extra.safetensors", *(f"{prefix}safetensors" for prefix in PREFIXES)):
        got = graph.sample(graph.usp(file=name), steps=2)
        both.add(f"{name}, values", got, want)
        both.add(f"{name}, file", got, graph.sample(graph.stock(name), steps=2))
    got = graph.sample(graph.usp(file="scaled.safetensors"), steps=2)
    both.add("scaled, values", got, graph.sample(graph.stock("scaled_values.safetensors"), steps=2))
    both.add("scaled, file", got, graph.sample(graph.stock("scaled.safetensors"), steps=2))
    both.check(host)
    said = [line for line in host.log_text().splitlines() if "that FLUX.1 does not use are ignored" in line]
    assert len(said) == 1 and "extra.safetensors: 3 tensors" in said[0] and "'steps'" in said[0]


def test_storage_types_of_a_quantised_file(host, models):
    """What is converted when it is loaded has the same values, in other memory; the workers stay."""
    write("scaled_tensors", models / DEV, models / "fp8.safetensors")
    graph = Graph()
    given = {"steps": 2, "positive": graph.prompt()}
    kept, converted = (
        graph.save(graph.sample(graph.usp(file="fp8.safetensors", weight_dtype=dtype), **given))
        for dtype in ("default", "fp32")
    )
    latents = host.run(graph).latents
    assert difference(latents[kept], latents[converted]) < REORDERED
