"""The example that needs no download, in ComfyUI: the shipped model draws what its caption says, as stock draws it."""

import json
from pathlib import Path

import pytest
from comfy import PromptFailed
from workflows import Comparison, Graph

from fastusp_backend import shapes

pytestmark = pytest.mark.host

EXAMPLE = Path(__file__).resolve().parents[2] / "example_workflows/api/fastusp_demo_shapes_api.json"
TOLERANCE = 2e-4
"""Of the largest value: a trained model makes more of rounding than random weights do."""
CAPTION = "a large yellow triangle left of a small purple square on grey"


@pytest.mark.any_host
def test_the_shipped_model_draws_in_stock_and_in_usp_nodes_alike(host):
    both = Comparison()
    graph = both.graph
    prompt, empty = graph.node("FastUSPDemoPrompt", text=CAPTION), graph.empty(256, 256)
    given = {"positive": prompt, "negative": prompt, "latent_image": empty, "steps": 20, "seed": 1}
    want = graph.sample(graph.stock(shapes.MODEL.name), **given)
    for gpus in ("cpu:1", "cpu:2"):
        got = graph.sample(graph.usp(gpus, file=shapes.MODEL.name), node="FastUSPSampler", **given)
        both.add(gpus, got, want)
    both.check(host, TOLERANCE)


def test_the_example_draws_what_its_caption_says(host):
    graph = Graph(json.loads(EXAMPLE.read_text(encoding="utf-8")))
    (loader,) = [node for node in graph.values() if node["class_type"] == "FastUSPLoader"]
    (prompt,) = [node for node in graph.values() if node["class_type"] == "FastUSPDemoPrompt"]
    loader["inputs"]["gpus"], prompt["inputs"]["text"] = "cpu:2", CAPTION
    (picture,) = host.run(graph).images
    assert shapes.unmet(shapes.Caption.read(CAPTION), picture) == []


def test_a_word_that_the_model_does_not_know(host):
    graph = Graph()
    prompt = graph.node("FastUSPDemoPrompt", text="a pink dog")
    graph.save(graph.sample(graph.usp("cpu:1", file=shapes.MODEL.name), positive=prompt, negative=prompt))
    with pytest.raises(PromptFailed) as error:
        host.run(graph)
    assert "Use the demo model's words: a, small, large, red" in error.value.text
    assert "It does not know 'pink', 'dog'" in error.value.text
