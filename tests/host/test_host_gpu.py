"""A real ComfyUI on a GPU, and workers on the same one: 16-bit latents are stock's but for rounding."""

import pytest
import torch
from comfy import ComfyUI
from hosts import host_paths, knows_small_flux
from workflows import IN_WORKERS, ONE_Z_IMAGE, QWEN_IMAGE, SMALL_CHROMA, STEPPING, WIDE, Graph

from fastusp_backend.models.synthetic import TINY_FLUX2, TINY_SD3, write_checkpoint

PATHS = [path for path in host_paths() if knows_small_flux(path)]
pytestmark = [
    pytest.mark.host,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not PATHS, reason="needs a ComfyUI of version 0.4 or newer at COMFYUI_PATHS or ~/ComfyUI"),
]


@pytest.fixture(scope="module")
def gpu_host(tmp_path_factory):
    comfyui = ComfyUI(PATHS[0], tmp_path_factory.mktemp("gpu-host"), arguments=())
    models, bf16 = comfyui.base / "models/diffusion_models", {"dtype": torch.bfloat16}
    try:
        write_checkpoint(str(models / "flux.safetensors"), WIDE, **bf16)
        write_checkpoint(str(models / "flux2.safetensors"), TINY_FLUX2, **bf16)
        write_checkpoint(str(models / "qwen.safetensors"), QWEN_IMAGE, **bf16)
        write_checkpoint(str(models / "chroma.safetensors"), SMALL_CHROMA, **bf16)
        write_checkpoint(str(models / "sd3.safetensors"), TINY_SD3, **bf16)
        write_checkpoint(str(models / "z_image.safetensors"), ONE_Z_IMAGE, **bf16)
        comfyui.wait_until_ready()
        yield comfyui
    finally:
        comfyui.stop()


@pytest.mark.parametrize("sampler, where", [("euler", IN_WORKERS), ("dpmpp_2m_sde", STEPPING)])
@pytest.mark.parametrize(
    "file, width, guidance, empty",
    [
        ("flux.safetensors", 4096, 3.5, "EmptySD3LatentImage"),
        ("flux2.safetensors", TINY_FLUX2.context, 3.5, "EmptyFlux2LatentImage"),  # 3500 is no bfloat16
        ("chroma.safetensors", SMALL_CHROMA.context, 0.0, "EmptySD3LatentImage"),
        ("qwen.safetensors", 3584, 1.0, "EmptySD3LatentImage"),
        ("sd3.safetensors", TINY_SD3.context, 1.0, "EmptySD3LatentImage"),
        ("z_image.safetensors", ONE_Z_IMAGE.context, 1.0, "EmptySD3LatentImage"),
    ],
)
def test_16_bits(gpu_host, file, width, guidance, empty, sampler, where):
    graph, pooled = Graph(), {"pooled": TINY_SD3.pooled} if file == "sd3.safetensors" else {}
    inputs = {
        "positive": graph.prompt(1, 24, guidance, width, **pooled),
        "negative": graph.prompt(2, 7, guidance, width, **pooled),
        "latent_image": graph.node(empty, width=256, height=192, batch_size=1),
        "cfg": 2.0,
        "steps": 8,
        "sampler_name": sampler,
    }
    got, want = (graph.sample(model, **inputs) for model in (graph.usp("0", file=file), graph.stock(file)))
    latents = [graph.save(latent) for latent in (got, want)]
    outcome = gpu_host.run(graph)
    ours, stock = (outcome.latents[node].float() for node in latents)
    assert any(where in text for text in outcome.texts_of(got[0]))
    assert ((ours - stock).norm() / stock.norm()).item() < 0.03
