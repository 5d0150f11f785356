"""A real ComfyUI whose driver, a pretended one, tells of two GPUs that PCIe joins: what people are told of them."""

import json

import pytest
import torch
from comfy import REPOSITORY, ComfyUI, PromptFailed
from workflows import DEV, Graph

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(torch.cuda.is_available(), reason="workers shall find none of the pretended GPUs"),
]

JOINED = [
    {"name": "NVIDIA H100 80GB HBM3", "memory": [80 << 30, 79 << 30], "pcie": [4, 8], "ancestors": {str(1 - n): 50}}
    for n in range(2)
]


@pytest.fixture
def two_gpus(host, tmp_path):
    environment = {"PYTHONPATH": str(REPOSITORY / "tests/fake_nvml"), "FAKE_NVML": json.dumps({"gpus": JOINED})}
    comfyui = ComfyUI(host.path, tmp_path / "two-gpus", environment=environment)
    try:
        (comfyui.base / "models/diffusion_models" / DEV).symlink_to(host.base / "models/diffusion_models" / DEV)
        comfyui.wait_until_ready()
        yield comfyui
    finally:
        comfyui.stop()


def test_fewer_gpus_that_are_predicted_to_be_faster_are_named(two_gpus):
    """By USP Loader while its workers start, in ComfyUI's log and under the node. These do not, for want of GPUs; what
    runs on CPU ranks next does."""
    graph = Graph()
    loader = graph.usp("auto")
    graph.save(graph.sample(loader, steps=2))
    with pytest.raises(PromptFailed) as failed:
        two_gpus.run(graph)
    told = failed.value.outcome.texts_of(loader[0])
    assert any("may be faster: see ComfyUI's log" in text for text in told), told
    assert "Set gpus to 0 in USP Loader: a step of FLUX.1 at 1024 x 1024 and cfg 1 is predicted to take" in (
        two_gpus.log_text()
    )
    graph = Graph()
    saved = graph.save(graph.sample(graph.usp("cpu:1"), steps=2))
    assert saved in two_gpus.run(graph).latents
