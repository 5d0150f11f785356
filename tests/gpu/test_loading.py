"""Files read onto a GPU through pinned buffers: the bytes that the CPU's mapping has, and graphs that unpack them."""

import pytest
import torch
from formats import FORMATS, write
from support import OneRank, load_model

from fastusp_backend.config import ModelSpec, Settings
from fastusp_backend.models.layers import Linear
from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights import reading

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "tiny.safetensors"
    write_checkpoint(str(path), TINY_FLUX, seed=1)
    return path


@pytest.mark.parametrize("name", [*FORMATS, "plain"])
@pytest.mark.parametrize("storage, keep", [(None, True), ("bfloat16", True), ("bfloat16", False)])
def test_a_gpu_holds_what_the_cpu_holds(plain, tmp_path, monkeypatch, name, storage, keep):
    monkeypatch.setattr(reading, "PIECE", 1_000_003)
    path = plain
    if name != "plain":
        path = tmp_path / name
        write(name, plain, path)
    spec = ModelSpec.of_file(str(path), storage=storage, compute="float32", keep_quantised=keep)
    expected, got = load_model(spec, CPU), load_model(spec, CUDA)
    assert all(p.is_cuda for p in got.parameters())
    for (layer, theirs), ours in zip(expected.named_modules(), got.modules(), strict=True):
        for (leaf, a), b in zip(theirs.named_parameters(recurse=False), ours.parameters(recurse=False), strict=True):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8)), f"{layer}.{leaf}"
        if isinstance(theirs, Linear):
            assert torch.equal(theirs.stored.dequantise(), ours.stored.dequantise().cpu()), layer


@pytest.mark.parametrize(
    "name", ["fp8_e4m3fn", "scaled_metadata", "nvfp4", "int8_convrot", "mixed", "gguf_Q8_0", "gguf_Q4_K"]
)
def test_graphs_convert_as_they_run(plain, tmp_path, name):
    """Captured evaluations with the weights as stored, against eager ones with weights converted at load."""
    write(name, plain, tmp_path / name)
    outputs = []
    for keep, settings in ((True, Settings()), (False, Settings(compile=False, cuda_graphs=False, overlap=False))):
        spec = ModelSpec.of_file(str(tmp_path / name), storage="bfloat16", compute="bfloat16", keep_quantised=keep)
        denoiser = OneRank(load_model(spec, CUDA), settings, torch.bfloat16, CUDA)
        generator = torch.Generator("cuda").manual_seed(0)
        like = {"device": CUDA, "generator": generator}
        prompt = Prompt(torch.randn(1, 24, TINY_FLUX.context, **like), torch.randn(1, TINY_FLUX.pooled, **like))
        x = torch.randn(1, 16, 32, 32, **like)
        for _ in range(3):
            output = denoiser(x, torch.tensor([0.5]), prompt).float().clone()
        outputs.append(output)
        assert all(cached.captured == keep for cached in denoiser.evaluations.values())
    assert ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item() < 2e-2
