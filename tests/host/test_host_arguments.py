"""What ComfyUI was started with counts for the weights, as in Load Diffusion Model, unless the node says otherwise."""

import pytest
from comfy import ComfyUI
from workflows import DEV, Comparison, difference

pytestmark = pytest.mark.host


def test_a_type_for_all_weights(host, tmp_path):
    fp8 = ComfyUI(host.path, tmp_path, ("--cpu", "--fp8_e4m3fn-unet"))
    try:
        (tmp_path / "models/diffusion_models" / DEV).symlink_to(host.base / "models/diffusion_models" / DEV)
        fp8.wait_until_ready()
        runs = Comparison()
        graph = runs.graph
        inputs = {"steps": 4}
        usp = graph.sample(graph.usp(), **inputs)
        runs.add("by the argument", usp, graph.sample(graph.stock(), **inputs))
        wide = graph.save(graph.sample(graph.usp(weight_dtype="fp32"), **inputs))
        latents = runs.check(fp8).latents
        assert difference(latents[runs.pairs[0][3]], latents[wide]) > 1e-3
    finally:
        fp8.stop()
