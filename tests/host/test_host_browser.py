"""The page itself, in a headless browser: what it shows again when it is loaded in mid-run, and the panel."""

import json

import pytest
from browser import PROGRAM, Page
from workflows import IN_WORKERS, Graph

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

TEXTS = """app.graph.nodes.flatMap(node => (node.widgets ?? []).filter(widget => widget.name == "$$node-text-preview")
    .map(widget => `${node.type}: ${widget.value}`)).join("; ")"""
PANEL = 'document.querySelector(".fastusp")?.innerText'


def has(where: str, text: str) -> str:
    return f"({where} ?? '').includes({json.dumps(text)})"


def queue(page: Page, graph: Graph) -> None:
    """As a workflow of its own, with an id, as if it were opened from a file."""
    page.evaluate(f"app.loadApiJson({json.dumps(graph)}, 'words')")
    page.evaluate("app.loadGraphData(app.graph.serialize())")
    page.evaluate("app.queuePrompt(0, 1)")


def test_a_reload_in_the_middle_of_a_run(host, page):
    graph = Graph()
    inputs = {"latent_image": graph.empty(384, 384), "positive": graph.prompt(1, 256)}
    graph.save(graph.sample(graph.usp("cpu:1"), steps=4000, seed=320, **inputs))  # one core; the page wants the other
    queue(page, graph)
    page.wait_for(has(TEXTS, IN_WORKERS), 60)
    try:
        page.load()
        page.wait_for(has(TEXTS, IN_WORKERS))
        page.evaluate("""(async () => {
            const other = app.graph.serialize();
            other.id = "11111111-2222-3333-4444-555555555555";
            await app.loadGraphData(other);
            await new Promise(done => setTimeout(done, 1000));
        })()""")
        assert page.evaluate(TEXTS) == "", "on the nodes of another workflow, which happen to have the same numbers"
    finally:
        host.post("/interrupt", {})


def test_an_error_on_the_node_and_in_the_panel(host, page):
    graph = Graph()
    positive = graph.node("TestSeededConditioning", seed=1, tokens=7, width=2048, guidance=3.5)
    graph.save(graph.sample(graph.usp(), steps=2, positive=positive))
    queue(page, graph)
    page.wait_for(has(TEXTS, "KSampler: FastUSP: failed: "), 60)
    page.evaluate("app.extensionManager.sidebarTab.toggleSidebarTab('fastusp')")
    page.wait_for(has(PANEL, host.pool("cpu:2")["error"]))
    assert "idle: warm, waiting for a run" in page.evaluate(PANEL)
