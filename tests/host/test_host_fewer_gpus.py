"""A real ComfyUI whose driver, a pretended one, tells of two GPUs that PCIe joins: what people are told of them."""

import json
import re

import pytest
from comfy import REPOSITORY, ComfyUI, PromptFailed
from workflows import DEV, Graph

pytestmark = pytest.mark.host

SLOW = {"name": "NVIDIA H100 80GB HBM3", "memory": [80 << 30, 79 << 30], "pcie": [1, 1]}
JOINED = [SLOW | {"uuid": f"GPU-pretended-{n}", "ancestors": {str(1 - n): 50}} for n in range(2)]


@pytest.fixture
def two_gpus(host, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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
    with pytest.raises(PromptFailed, match=r"workers on gpu 0,1 did not start: rank \d failed") as failed:
        two_gpus.run(graph)
    assert any("; gpu 0 may be faster: see ComfyUI's log" in text for text in failed.value.outcome.texts_of(loader[0]))
    step = r"a step of FLUX.1 at 1024 x 1024 and cfg 1 is predicted to take ([\d.]+) ms there, and (\d+) ms on gpu 0,1"
    (told,) = re.findall(rf"Set gpus to 0 in USP Loader: {step} over PCIe 1 x1; wire = auto", two_gpus.log_text())
    assert float(told[0]) < 1 < int(told[1])
    graph = Graph()
    saved = graph.save(graph.sample(graph.usp("cpu:1"), steps=2))
    assert saved in two_gpus.run(graph).latents
