"""The example that needs no download, in ComfyUI: the shipped model draws what its caption says, as stock draws it."""

import base64
import io
import json
import time
from pathlib import Path

import pytest
from browser import PROGRAM, Page
from comfy import PromptFailed, pixels
from torch.nn import functional
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
SAMPLER = """app.graph.nodes.find(node => node.type == "FastUSPSampler")"""
SEED = f"""{SAMPLER}.widgets.find(widget => widget.name == "seed").value"""
TOLERANCE = 2e-4
"""Of the largest value: a trained model makes more of rounding than random weights do."""
CAPTION = "a large yellow triangle left of a small purple square on grey"


def test_the_shipped_model_draws_in_stock_and_in_usp_nodes_alike(host):
    both = Comparison()
    graph = both.graph
    prompt, empty = graph.node("FastUSPDemoPrompt", text=CAPTION), graph.empty(256, 256)
    given = {"positive": prompt, "negative": prompt, "latent_image": empty, "steps": 5, "seed": 1}
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
    outcome = host.run(graph)
    (picture,) = outcome.images
    assert shapes.unmet(shapes.Caption.read(CAPTION), picture) == []
    small, seen = (functional.adaptive_avg_pool2d(image, 32) for image in (outcome.preview, picture))
    assert (small - seen).abs().mean() < 0.05, "the preview has other colours"


def test_a_word_that_the_model_does_not_know(host):
    graph = Graph()
    prompt = graph.node("FastUSPDemoPrompt", text="a pink dog")
    graph.save(graph.sample(graph.usp("cpu:1", file=shapes.MODEL.name), positive=prompt, negative=prompt))
    with pytest.raises(PromptFailed) as error:
        host.run(graph)
    assert "Use the demo model's words: a, small, large, red" in error.value.text
    assert "It does not know 'pink', 'dog'" in error.value.text


def click(page: Page, what: str) -> None:
    """What is in ComfyUI's own windows, once it is there."""
    page.wait_for(f"!!({what})")
    page.evaluate(f"({what}).click()")


def labelled(text: str, within: str) -> str:
    """The innermost element there that says so."""
    return f"[...document.querySelectorAll('{within} *')].find(n => !n.children.length && n.textContent == '{text}')"


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
@pytest.mark.parametrize(
    "renderer", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["canvas", "Nodes 2.0"], indirect=True
)
def test_from_an_empty_page_to_a_picture_of_two_ranks(host, page, renderer):
    """By what is on the screen alone: ComfyUI's templates, ours among them, two ranks, Run. Nothing is typed, and the
    page is not loaded again. A small window, in which the whole of it is legible."""
    page.resize(1400, 757)
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for("app.graph.nodes.length == 0")
    page.evaluate("window.same = true")
    began = time.time()
    click(page, "document.querySelector('button[aria-label=Templates]')")
    click(page, labelled("FastUSP", "[role=dialog]"))
    click(page, labelled(PAGE.stem, "[role=dialog]"))
    page.wait_for("app.graph.nodes.length == 7 && app.canvas.ds.scale >= 0.75")
    page.evaluate(f"{SEED} += {2 + renderer}")  # or ComfyUI has the picture still, of the renderer before
    page.click("[...document.querySelectorAll('.fastusp-choose button')].find(chip => chip.innerText == 'cpu:2')")
    page.click("[...document.querySelectorAll('button')].find(button => button.innerText.trim() == 'Run')")
    shown = pixels(io.BytesIO(base64.b64decode(page.wait_for(SHOWN, 90))))
    (prompt,) = [x for x in json.loads(PAGE.read_text(encoding="utf-8"))["nodes"] if x["type"] == "FastUSPDemoPrompt"]
    assert shapes.unmet(shapes.Caption.read(prompt["widgets_values"][0]), shown) == []
    pool = host.pool("cpu:2")
    assert pool["history"][0]["ended"] > began, "the workers did not run"
    assert (pool["ranks"], pool["model"]) == (2, shapes.MODEL.name) and "error" not in pool
    assert page.evaluate("window.same") is True
