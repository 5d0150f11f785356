"""What ComfyUI was started with counts for the weights, as in Load Diffusion Model, unless the node says otherwise."""

import pytest
from workflows import Comparison, difference

pytestmark = pytest.mark.host


def test_a_type_for_all_weights(second_host):
    runs = Comparison()
    graph = runs.graph
    inputs = {"steps": 4}
    usp = graph.sample(graph.usp(), **inputs)
    runs.add("by the argument", usp, graph.sample(graph.stock(), **inputs))
    wide = graph.save(graph.sample(graph.usp(weight_dtype="fp32"), **inputs))
    latents = runs.check(second_host).latents
    assert difference(latents[runs.pairs[0][3]], latents[wide]) > 1e-3
