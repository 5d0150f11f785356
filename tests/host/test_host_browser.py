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


def button(label: str, devices: str) -> str:
    return f"""[...document.querySelectorAll('.fastusp section[aria-label="Pool on {devices}"] button')]
        .find(button => button.textContent == {json.dumps(label)})"""


def panel(page: Page) -> None:
    if not page.evaluate(f"!!({PANEL})"):
        page.evaluate("app.extensionManager.sidebarTab.toggleSidebarTab('fastusp')")
        page.wait_for(f"!!({PANEL})")


def test_the_panel_follows_a_run_and_stops_a_pool(host, page):
    """Steps as they come, the summary of the last run; a button that stops workers in mid-run, with the keyboard."""
    panel(page)
    graph = Graph()
    given = {"latent_image": graph.empty(256, 256), "positive": graph.prompt(1, 64)}
    graph.save(graph.sample(graph.usp("cpu:1"), steps=3, seed=321, **given))
    queue(page, graph)
    page.wait_for(has(PANEL, "3 steps in "), 60)
    focused = f"({button('Stop', 'cpu:1')}).focus(), document.activeElement.textContent"
    assert page.evaluate(focused) == "Stop"
    host.pool("cpu:1")  # is there
    graph = Graph()
    given = {"latent_image": graph.empty(384, 384), "positive": graph.prompt(1, 256)}
    graph.save(graph.sample(graph.usp("cpu:1"), steps=4000, seed=322, **given))
    queue(page, graph)
    page.wait_for(f"/step [0-9]+ of 4000, [0-9.]+ ms a step, [0-9]+ s left/.test({PANEL})", 60)
    assert page.evaluate("document.activeElement.textContent") == "Stop", "what is focused stays in the page"
    assert page.evaluate(f"({button('Release memory', 'cpu:1')}).disabled") is True
    page.evaluate(f"({button('Stop', 'cpu:1')}).click()")
    page.wait_for(has(PANEL, "they were stopped from the page"), 30)
    assert host.pool("cpu:1")["state"] == "off"


def test_what_gpus_do_is_told(host, page):
    """As NVML tells it; there are none here."""
    assert host.get("/fastusp/gpus") == {"gpus": []} or host.get("/fastusp/gpus")["gpus"]
    pool = {"ranks": 2, "gpus": [0, 2], "starts": 1}
    told = {"used": 38_200_000_000, "total": 80_000_000_000, "utilisation": 97, "temperature": 64}
    loads = [told | {"index": 0}, told | {"index": 1}, dict.fromkeys(told) | {"index": 2}]
    module = "import('/extensions/ComfyUI-FastUSP/panel.js')"
    rows = page.evaluate(f"{module}.then(({{ facts }}) => facts({json.dumps(pool)}, {json.dumps(loads)}))")
    assert rows[1:3] == [["GPU 0", "97 % busy, 38.2 of 80.0 GB in use, 64 °C"], ["GPU 2", ""]]


def test_commands_that_keys_can_be_bound_to(host, page):
    panel(page)
    host.run(_short("cpu:1"))
    page.evaluate("app.extensionManager.command.execute('FastUSP.release')")
    page.wait_for(has(PANEL, "released: loads with the next run"))
    before = host.pool("cpu:1")["starts"]
    page.evaluate("app.extensionManager.command.execute('FastUSP.restart')")
    page.wait_for(has(PANEL, "idle: warm, waiting for a run"), 60)
    assert host.pool("cpu:1")["starts"] == before + 1


def _short(gpus: str) -> Graph:
    graph = Graph()
    graph.save(graph.sample(graph.usp(gpus), steps=1))
    return graph
