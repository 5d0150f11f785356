"""What is below USP Loader's widgets: GPUs to be picked, what the node's values would come to."""

import json

import pytest
from browser import PROGRAM, Page
from conversion import node, open_prompt, user
from workflows import DEV

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

TOLD = "document.querySelector('.fastusp-choose')?.innerText ?? ''"
PROBLEM = "document.querySelector('.fastusp-choose .problem')?.innerText ?? ''"
GPUS = "app.graph.getNodeById(1).widgets.find(({ name }) => name == 'gpus')"
FIELD = "[...document.querySelectorAll('[data-node-id=\"1\"] input')].find(({ value }) => value == 'cpu:2')"
UNDO = "app.extensionManager.workflow.activeWorkflow.changeTracker.undo()"
AGAIN = "import('/scripts/api.js').then(({ api }) => { api.dispatchCustomEvent('reconnected'); })"
COUNTED = """import('/scripts/api.js').then(({ api }) => {
    const { fetchApi } = api;
    let times = 0;
    api.fetchApi = (route, options) => {
        times += route === "/fastusp/plan";
        return fetchApi.call(api, route, options);
    };
    window.counted = () => {
        api.fetchApi = fetchApi;
        return times;
    };
})"""
"""How often USP Loaders ask what their values come to, from here until `counted()`."""
TWO_GPUS = """import('/scripts/api.js').then(({ api }) => {
    const gpus = [0, 1].map(index => ({ index, name: 'NVIDIA GeForce RTX 4090', used: 1e9, total: 24e9 }));
    const { fetchApi } = api;
    api.fetchApi = (route, options) => {
        const answer = { "/fastusp/gpus": { gpus }, "/fastusp/plan": { gpus: [0, 1], lines: ["as told"] } }[route];
        return answer ? Promise.resolve(new Response(JSON.stringify(answer))) : fetchApi.call(api, route, options);
    };
    window.trueApi = () => { api.fetchApi = fetchApi; };
})"""


def chip(label: str) -> str:
    chips = "[...document.querySelectorAll('.fastusp-choose button')]"
    return f"{chips}.find(chip => chip.textContent.startsWith({json.dumps(label)}))"


def typed(page: Page, name: str, value) -> None:
    """As an edit of the widget by its user."""
    page.evaluate(f"""{{
        const widget = app.graph.getNodeById(1).widgets.find(({{ name }}) => name == '{name}');
        widget.value = {json.dumps(value)};
        widget.callback(widget.value);
    }} 0""")


def loader(page: Page, **inputs) -> None:
    given = {"unet_name": DEV, "weight_dtype": "default", "gpus": "cpu:2", "ulysses": 0, "ring": 0}
    open_prompt(page, {"1": node("FastUSPLoader", **given | inputs), "2": node("FastUSPSettings", wire="int8")})


def test_what_the_values_would_come_to(page, renderer):
    loader(page)
    page.wait_for(f"({TOLD}).includes('cpu:2: ulysses 2 x ring 1; for 2 prompts')")
    assert " MB, which the ranks share" in page.evaluate(TOLD) and not page.evaluate(PROBLEM)
    typed(page, "ulysses", 3)
    page.wait_for(f"({PROBLEM}).startsWith('Set 0, or a legal layout (ulysses 2 x ring 1, ')")
    typed(page, "ulysses", 0)
    page.evaluate(f"{chip('cpu:1')}.click()")
    page.wait_for(f"({TOLD}).includes('cpu:1: ulysses 1 x ring 1\\n') && {chip('cpu:1')}.ariaPressed == 'true'")
    assert page.evaluate(f"{GPUS}.value") == "cpu:1"
    page.evaluate(UNDO)
    page.wait_for(f"({TOLD}).includes('cpu:2: ') && {GPUS}.value == 'cpu:2'")


def test_gpus_are_picked(page, renderer):
    page.evaluate(TWO_GPUS)
    try:
        loader(page, gpus="auto")
        page.evaluate(AGAIN)
        page.wait_for(f"{chip('1: RTX 4090, 23.0 GB free')}?.ariaPressed == 'true'")
        page.evaluate(f"{chip('0: ')}.click()")
        assert page.evaluate(f"{GPUS}.value") == "1"
        page.evaluate(f"{chip('all')}.click()")
        assert page.evaluate(f"{GPUS}.value") == "all"
    finally:
        page.evaluate("trueApi()")
        page.evaluate(AGAIN)


def test_nothing_of_it_is_saved_or_sent(page):
    loader(page)
    page.wait_for(f"({TOLD}).includes('cpu:2: ')")
    saved = page.evaluate("app.graph.serialize().nodes.find(({ id }) => id == 1)")
    assert saved["widgets_values"] == [DEV, "default", "cpu:2", 0, 0, "auto"]
    prompt = page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    assert "fastusp" not in prompt["1"]["inputs"]


def test_values_that_are_set_elsewhere(page):
    """On the box of a subgraph, in the settings' node outside of it; one that a node computes is not known."""
    loader(page)
    page.evaluate("app.graph.state.lastNodeId = 900")  # a box has the values of earlier workflows' node of its number
    user(page, "of(2).connect(0, of(1), 'settings'); box(1, 'gpus')")
    inner = "[...app.graph.rootGraph.subgraphs.values()].at(-1).nodes[0]"
    module = "import('/extensions/ComfyUI-FastUSP/{}.js')".format
    values = f"{module('choose')}.then(({{ valuesOf }}) => valuesOf({inner}))"
    found = page.evaluate(values)
    assert (found["gpus"], found["settings"]["wire"]) == ("cpu:2", "int8")
    assert page.evaluate(f"{module('values')}.then(({{ setValue }}) => setValue({inner}, 'gpus', 'cpu:1'))") is True
    assert page.evaluate(values)["gpus"] == "cpu:1"
    prompt = page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    assert "cpu:1" in [node["inputs"].get("gpus") for node in prompt.values()]
    loader(page)
    page.evaluate("""{
        const text = LiteGraph.createNode("PrimitiveString");
        app.graph.add(text);
        text.connect(0, app.graph.getNodeById(1), "gpus");
    } 0""")
    page.wait_for(f"({TOLD}).includes('gpus comes from another node')")
    page.evaluate(COUNTED)
    page.evaluate(AGAIN)
    assert page.evaluate("counted()") == 1, "the loader of before, in its subgraph, is gone"
    assert page.evaluate(f"{chip('cpu:1')}.disabled") is True


@pytest.mark.parametrize("renderer", [True], ids=["Nodes 2.0"], indirect=True)  # which has the widget in the page
def test_gpus_as_torch_counts_them_are_typed(host, page, renderer):
    """They are picked, or what to set where there are none is told at once, before anything runs."""
    loader(page)
    page.wait_for(f"({TOLD}).includes('cpu:2: ')")
    page.wait_for(f"!!{FIELD}")
    page.evaluate(f"{FIELD}.focus(), {FIELD}.select()")
    page.type("cuda:0")
    page.press("Enter", 13)
    page.wait_for(f"{GPUS}.value == 'cuda:0'")
    if host.get("/fastusp/gpus")["gpus"]:
        page.wait_for(f"{chip('0: ')}?.ariaPressed == 'true' && !({PROBLEM})")
    else:
        page.wait_for(f"""({PROBLEM}).startsWith("Set 'cpu:N' for N CPU ranks, as CUDA counts no GPU here")""")
