"""The example that needs no download, in ComfyUI: the shipped model draws what its caption says, as stock draws it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import PROGRAM
from comfy import PromptFailed
from PIL import Image
from workflows import Comparison, Graph

from fastusp_backend import shapes

pytestmark = pytest.mark.host

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
EXAMPLE = EXAMPLES / "api/fastusp_demo_shapes_api.json"
PAGE = EXAMPLES / "FastUSP demo shapes.json"
SHOWN = """(() => {
    const picture = app.graph.nodes.find(node => node.type == "SaveImage").imgs?.[0];
    if (!picture?.naturalWidth) return "";
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    canvas.getContext("2d").drawImage(picture, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
})()"""
"""The picture that the page shows on the node, as PNG."""
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


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
def test_the_page_shows_what_the_caption_says(host, page):
    workflow = json.loads(PAGE.read_text(encoding="utf-8"))
    (loader,) = [node for node in workflow["nodes"] if node["type"] == "FastUSPLoader"]
    (prompt,) = [node for node in workflow["nodes"] if node["type"] == "FastUSPDemoPrompt"]
    loader["widgets_values"][2] = "cpu:2"
    (sampler,) = [node for node in workflow["nodes"] if node["type"] == "FastUSPSampler"]
    sampler["widgets_values"][1] = "fixed"
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)})")
    page.evaluate("app.queuePrompt(0, 1)")
    with Image.open(io.BytesIO(base64.b64decode(page.wait_for(SHOWN, 60)))) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0) / 255
    assert shapes.unmet(shapes.Caption.read(prompt["widgets_values"][0]), pixels) == []
