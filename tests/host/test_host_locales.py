"""The page in other languages: the nodes, the commands and the help, as ComfyUI and its page look for them."""

import json
import urllib.request

import pytest
from browser import PROGRAM
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


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
def test_shown(host, page):
    assert dict(page.evaluate(COMMANDS)) == locale("en", "commands"), "all of them, as the page calls them"
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        page.load()
        node = locale("zh", "nodeDefs")["FastUSPSampler"]
        names = {entry["name"] for entry in node["inputs"].values()}
        title, *inputs, output = page.evaluate(SHOWN)
        assert title == node["display_name"] and set(inputs) == names and output == node["outputs"]["0"]["name"]
        entries = locale("zh", "main")["contextMenu"]
        assert page.evaluate(ENTRIES % json.dumps([*entries])) == [*entries.values()]
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
