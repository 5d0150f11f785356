"""The page in other languages: the nodes, the commands and the help, as ComfyUI and its page look for them."""

import contextlib
import json
import urllib.request

import pytest
from browser import PROGRAM, Page
from comfy import REPOSITORY

pytestmark = pytest.mark.host

NODES = sorted(path.stem for path in (REPOSITORY / "web/docs").glob("*.md"))
SHOWN = """(() => {
    const node = LiteGraph.createNode("FastUSPSampler");
    return [node.title, ...node.inputs.map(input => input.localized_name), node.outputs[0].localized_name];
})()"""
ENTRIES = """(() => {
    const menu = new LiteGraph.ContextMenu(%s.map(content => ({content})), {});
    const texts = [...menu.root.querySelectorAll(".litemenu-entry")].map(entry => entry.textContent);
    menu.close();
    return texts;
})()"""
COMMANDS = """app.extensionManager.command.commands.filter(command => command.id.startsWith("FastUSP."))
    .map(command => [command.id.replaceAll(".", "_"), {label: command.label}])"""


def locale(language: str, file: str) -> dict:
    return json.loads((REPOSITORY / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


@pytest.mark.any_host
@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_served(host, language):
    served = host.get("/i18n")[language]
    assert served.items() >= locale(language, "main").items()
    for file in ("nodeDefs", "commands"):
        assert served[file].items() >= locale(language, file).items()
    if language != "en":
        for node in NODES:
            address = f"http://127.0.0.1:{host.port}/extensions/ComfyUI-FastUSP/docs/{node}/{language}.md"
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert answer.read() == (REPOSITORY / f"web/docs/{node}/{language}.md").read_bytes()


OURS = """(() => {
    const own = selector => [...document.querySelectorAll(selector)].map(node => node.textContent);
    return [...own(".fastusp h2, .fastusp button"), ...own(".fastusp-choose button"), ...own(".fastusp-measure button"),
        ...own("[role=tab]"), document.querySelector(".fastusp-measure p")?.textContent];
})()"""


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
@pytest.mark.parametrize("language", ["zh", pytest.param("ja", marks=pytest.mark.thorough)])
def test_shown(host, page, browser, language):
    assert dict(page.evaluate(COMMANDS)) == locale("en", "commands"), "all of them, as the page calls them"
    host.post("/settings", {"Comfy.Locale": language})
    with contextlib.ExitStack() as after:
        after.callback(host.post, "/settings", {"Comfy.Locale": "en"})
        page = after.enter_context(contextlib.closing(Page(browser, page.url)))
        node = locale(language, "nodeDefs")["FastUSPSampler"]
        names = {entry["name"] for entry in node["inputs"].values()}
        title, *inputs, output = page.evaluate(SHOWN)
        assert title == node["display_name"] and set(inputs) == names and output == node["outputs"]["0"]["name"]
        entries = locale(language, "main")["contextMenu"]
        assert page.evaluate(ENTRIES % json.dumps([*entries])) == [*entries.values()]
        words = json.loads((REPOSITORY / f"web/words/{language}.json").read_text(encoding="utf-8"))
        page.evaluate("app.extensionManager.sidebarTab.toggleSidebarTab('fastusp')")
        page.evaluate("app.extensionManager.command.execute('FastUSP.log')")
        page.evaluate("app.graph.clear(), app.graph.add(LiteGraph.createNode('FastUSPLoader')), 0")
        page.wait_for("document.querySelector('.fastusp-choose button[aria-pressed]')?.textContent.length > 0")
        page.evaluate("[...document.querySelectorAll('.fastusp-choose button')].at(-1).click()")
        page.wait_for("!!document.querySelector('.fastusp h2')")
        log = words["FastUSP log"].upper()  # as the page writes its tabs
        page.wait_for(f"{OURS}.includes({json.dumps(log)})")
        shown = page.evaluate(OURS)
        english = ("FastUSP pools", "Measure here ...", "Measure", "Cancel", "Close")
        assert {words[text] for text in english} <= {*shown}
        assert shown[-1].startswith(next(text for key, text in words.items() if key.startswith("Times steps on 1")))
