"""The example workflows and the help as the page shows them: room for each node, titles, what is missing, lines that
wrap."""

import json

import pytest
from browser import PROGRAM, Page
from comfy import REPOSITORY

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

EXAMPLES = sorted((REPOSITORY / "example_workflows").glob("*.json"))
FLUX = REPOSITORY / "example_workflows/FLUX.1 text to image.json"
OVERLAPS = """(() => {
    const boxes = app.graph.nodes.map(node => {
        const [title, scale] = [LiteGraph.NODE_TITLE_HEIGHT, app.canvas.ds.scale];
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        if (drawn) return [node.title, ...["left", "top", "right", "bottom"].map(side => drawn[side] / scale)];
        const [x, y, width, height] = [...node.pos, ...node.size];
        return [node.title, x, y - title, x + width, y + height];
    });
    const meet = ([, a, b, c, d], [, e, f, g, h]) => Math.min(c, g) > Math.max(a, e) && Math.min(d, h) > Math.max(b, f);
    const pairs = boxes.flatMap((box, at) => boxes.slice(at + 1).map(other => [box, other]));
    return pairs.filter(pair => meet(...pair)).map(pair => pair.map(([title]) => title));
})()"""
"""The pairs of nodes that cover each other, as they are drawn."""
DRAWN = "document.querySelectorAll('[data-node-id]').length"
TEMPLATES = "[...document.querySelectorAll('[data-testid^=template-workflow-]')]"
HELP = "document.querySelector('.node-help-content')"


def opened(page: Page, workflow: dict) -> None:
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, true, 'example')")


def pressed(page: Page, button: str) -> None:
    """A button, once it is there."""
    found = f"[...document.querySelectorAll('button')].find(one => {button})"
    page.wait_for(f"!!({found})")
    page.evaluate(f"({found}).click()")


@pytest.mark.parametrize(
    "renderer", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["canvas", "Nodes 2.0"], indirect=True
)
def test_room_for_each_node(page, renderer):
    """USP Loader's foot would be under the next node if what Nodes 2.0 draws below its inputs were forgotten."""
    assert EXAMPLES
    page.resize(500, 400)  # drawn by software: the more of it, the longer it takes
    try:
        for path in EXAMPLES:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            page.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, false)")
            page.wait_for(f"{DRAWN} == {len(workflow['nodes']) if renderer else 0}")
            page.wait_for(f"{OVERLAPS}.length == 0", 5)
    finally:
        page.resize(1400, 757)


def test_files_and_a_pack_that_are_missing(page):
    """Each file with its download; the pack by its name."""
    workflow = json.loads(FLUX.read_text(encoding="utf-8"))
    files = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", ())}
    opened(page, workflow)
    pressed(page, "one.innerText == 'View details'")
    offered = "[...document.querySelectorAll('[data-testid=missing-model-download]')].map(one => one.ariaLabel)"
    page.wait_for(f"{offered}.length >= {len(files)}")
    assert {*page.evaluate(offered)} == {f"Download {file}" for file in files}
    (loader,) = [node for node in workflow["nodes"] if node["type"] == "FastUSPLoader"]
    loader["type"] = "FastUSPLoaderOfAPackThatIsMissing"
    opened(page, workflow)
    pressed(page, "one.innerText == 'View details'")
    card = "(document.querySelector('[data-testid=missing-node-card]')?.innerText ?? '')"
    page.wait_for(f"{card}.split('\\n').includes('{loader['properties']['cnr_id']}')")
    assert "Unknown" not in page.evaluate(card)


def test_titles_and_pictures_of_the_templates(page):
    """The pictures are loaded here: the page loads those that are in sight."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    entries = "[...document.querySelectorAll('[role=dialog] [role=button]')]"
    entry = f"{entries}.find(one => one.innerText.trim() == 'FastUSP')"
    page.wait_for(f"!!({entry})")
    page.evaluate(f"({entry}).click()")
    page.wait_for(f"{TEMPLATES}.length == {len(EXAMPLES)}")
    titles = page.evaluate(f"{TEMPLATES}.map(one => one.innerText.split('\\n').at(-1))")
    assert {*titles} == {path.stem for path in EXAMPLES}
    folder = "/api/workflow_templates/ComfyUI-FastUSP/"
    for title in titles:
        picture = f"fetch('{folder}' + encodeURIComponent('{title}.jpg')).then(answer => answer.blob())"
        sides = page.evaluate(f"{picture}.then(createImageBitmap).then(({{ width, height }}) => [width, height])")
        assert sides[0] == sides[1] >= 400, title
    page.press("Escape", 27)


def test_help_wraps(page):
    """In the side bar as wide as it is at first."""
    page.evaluate("app.graph.clear(), app.graph.add(LiteGraph.createNode('FastUSPLoader')), 0")
    page.evaluate("app.canvas.selectNode(app.graph.nodes[0]), 0")
    pressed(page, "one.dataset.testid == 'info-button'")
    page.wait_for(f"({HELP}?.innerText ?? '').includes('What it refuses')")
    assert 200 < page.evaluate(f"{HELP}.clientWidth") < 320
    wider = f"[...{HELP}.querySelectorAll('*')].filter(one => one.scrollWidth > {HELP}.clientWidth)"
    assert page.evaluate(f"{wider}.map(one => one.outerHTML)") == []
