"""What is below USP Loader's widgets: GPUs to be picked, what the node's values would come to, Measure here."""

import json
import time
from pathlib import Path

import pytest
from browser import PROGRAM, Page
from comfy import ComfyUI
from conversion import node, open_prompt, user
from ending import wait_for_the_end
from workflows import DEV, Graph

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

TOLD = "document.querySelector('.fastusp-choose')?.innerText ?? ''"
PROBLEM = "document.querySelector('.fastusp-choose .problem')?.innerText ?? ''"
GPUS = "app.graph.getNodeById(1).widgets.find(({ name }) => name == 'gpus')"
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


WINDOW = "document.querySelector('.fastusp-measure')"
LINE = f"({WINDOW}.querySelector('[role=status]').innerText)"
ROWS = f"[...{WINDOW}.querySelectorAll('tr')].slice(1).map(row => [...row.cells].map(cell => cell.innerText))"


def press(page: Page, label: str, within: str = WINDOW) -> None:
    buttons = f"[...{within}.querySelectorAll('button')]"
    page.evaluate(f"{buttons}.find(button => button.textContent.startsWith('{label}')).click()")


def measure(page: Page, **options) -> None:
    """Opens the window of the open workflow's loader, and presses Measure."""
    page.wait_for("!!document.querySelector('.fastusp-choose')")
    press(page, "Measure here", "document.querySelector('.fastusp-choose')")
    page.evaluate(f"""{{
        const [width, height, steps] = {WINDOW}.querySelectorAll("input");
        [width.value, height.value, steps.value] = [64, 64, 1];
    }} 0""")
    press(page, "Measure")


def test_its_window(page):
    """Begins with the size of the workflow's pictures, not of those that another model makes of them, and leaves room
    for ComfyUI's messages."""
    graph = Graph()
    model = graph.node("ModelSamplingFlux", model=graph.usp(), max_shift=1.15, base_shift=0.5, width=64, height=64)
    first = graph.sample(model, latent_image=graph.latent())
    seen = graph.node("ReferenceLatent", conditioning=graph.prompt(), latent=first)
    graph.sample(graph.stock(), positive=seen, latent_image=graph.empty(512, 512))
    graph.save(graph.sample(model, latent_image=graph.empty(graph.node("PrimitiveInt", value=256), 192)))
    open_prompt(page, graph)
    page.wait_for("!!document.querySelector('.fastusp-choose')")
    page.evaluate("document.querySelector('.fastusp-choose > div > button').focus()")
    press(page, "Measure here", "document.querySelector('.fastusp-choose')")
    page.wait_for(f"[...{WINDOW}.querySelectorAll('input')].slice(0, 3).map(({{ value }}) => value) == '256,192,8'")
    page.resize(1400, 757)
    page.evaluate("app.extensionManager.toast.removeAll()")  # of what other tests made known
    page.wait_for("!document.querySelector('.p-toast-message')")
    page.evaluate(f"""{{
        {WINDOW}.querySelector("table").innerHTML = "<tr><td>a row</td></tr>".repeat(60);
        const detail = "Set 0, or a legal layout. ".repeat(8);
        app.extensionManager.toast.add({{ severity: "error", summary: "The run failed", detail, life: 60000 }});
    }} 0""")
    sides = "[...document.querySelectorAll('.p-toast-message')].map(toast => toast.getBoundingClientRect().bottom)"
    page.wait_for(f"{sides}.length > 0 && {sides}.every(bottom => bottom < {WINDOW}.getBoundingClientRect().top)", 5)
    assert page.evaluate(f"{WINDOW}.getBoundingClientRect().height > 300 && {WINDOW}.getBoundingClientRect().top > 0")
    page.evaluate("app.extensionManager.toast.removeAll()")
    press(page, "Close")
    assert page.evaluate("document.activeElement.innerText").startswith("Measure here")


def descendants(pid: int) -> list[int]:
    children = [int(one) for task in Path(f"/proc/{pid}/task").glob("*/children") for one in task.read_text().split()]
    return [*children, *(one for child in children for one in descendants(child))]


def starts(host: ComfyUI) -> int:
    return sum(pool["starts"] for pool in host.get("/fastusp/status")["pools"])


def test_measured_and_applied(host, page):
    graph = Graph()
    graph.save(graph.sample(graph.usp("cpu:1"), steps=1))
    host.run(graph)
    before = starts(host)
    loader(page, batch_parallel="on")
    measure(page)
    page.wait_for(f"{LINE} == 'measured'", 90)
    rows = page.evaluate(ROWS)
    assert [row[:5] for row in rows[:3]] == [
        ["1", "ulysses 1 x ring 1", "exact", "exact", "auto"],
        ["2", "ulysses 2 x ring 1", "exact", "exact", "auto"],
        ["2", "ulysses 2 x ring 1", "int8", "exact", "auto"],
    ]
    assert len(rows) == 7 and all(float(row[5]) > 0 and row[7].endswith(" MB") for row in rows)
    assert page.evaluate(f"[...{WINDOW}.querySelectorAll('td')].every(cell => cell.offsetHeight < 40)"), "in one line"
    assert starts(host) > before, "workers that had to leave are there again"
    values = "app.graph.getNodeById(1).widgets.map(({ value }) => value).slice(2, 6)"
    press(page, "Apply", f"{WINDOW}.querySelectorAll('tr')[3]")
    prompt = page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    settings = prompt[prompt["1"]["inputs"]["settings"][0]]["inputs"]
    assert page.evaluate(values) == ["cpu:2", 0, 0, "on"]
    assert (settings["wire"], settings["linear"]) == ("int8", "exact")
    page.evaluate(UNDO)
    assert "settings" not in page.evaluate("app.graphToPrompt().then(({ output }) => output)")["1"]["inputs"]
    press(page, "Apply", f"{WINDOW}.querySelectorAll('tr')[1]")
    assert page.evaluate(values) == ["cpu:1", 0, 0, "auto"], "one rank has no groups"
    loader(page, batch_parallel="off")
    press(page, "Apply", f"{WINDOW}.querySelectorAll('tr')[1]")
    assert "Open the workflow that was measured" in page.evaluate(LINE)
    assert page.evaluate(values) == ["cpu:2", 0, 0, "off"], "another workflow's node of the same number"
    press(page, "Close")
    assert page.evaluate(WINDOW) is None


def test_cancelled_its_processes_end(host, page):
    loader(page)
    known = {*descendants(host.process.pid)}
    measure(page)
    page.wait_for(f"{LINE}.includes('starting 1 worker(s) on cpu:1')", 60)
    deadline = time.monotonic() + 30
    while not (workers := [*{*descendants(host.process.pid)} - known]):
        assert time.monotonic() < deadline
    press(page, "Cancel")
    page.wait_for(f"{LINE}.startsWith('cancelled: ')", 30)
    assert not wait_for_the_end(workers, 10)
    press(page, "Close")


def test_it_waits_for_its_turn_and_leaves_the_queue(host, page):
    graph = Graph()
    inputs = {"latent_image": graph.empty(384, 384), "positive": graph.prompt(1, 256)}
    graph.save(graph.sample(graph.usp("cpu:1"), steps=4000, seed=330, **inputs))
    running = host.post("/prompt", {"prompt": graph, "client_id": host.client})["prompt_id"]
    try:
        loader(page)
        measure(page)
        page.wait_for(f"{LINE}.startsWith('waiting for its turn') && !{WINDOW}.querySelectorAll('button')[1].disabled")
        host.post("/queue", {"clear": True})
        page.wait_for(f"{LINE}.startsWith('Measure again: ')", 10)
        press(page, "Measure")
        page.wait_for(f"{LINE}.startsWith('waiting for its turn') && !{WINDOW}.querySelectorAll('button')[1].disabled")
        assert len(host.get("/queue")["queue_pending"]) == 1
        press(page, "Cancel")
        page.wait_for(f"{LINE} == 'cancelled before it began'")
        queue = host.get("/queue")
        assert not queue["queue_pending"] and [one[1] for one in queue["queue_running"]] == [running]
    finally:
        host.post("/interrupt", {})
    press(page, "Close")


def test_a_page_that_was_loaded_meanwhile(page):
    """Has a window again for the loader that is measured, not for another workflow's of its number, nor in the place
    of another loader's; until ComfyUI's queue has the measurement no more, as after a restart."""

    def told(workflow: str) -> None:
        page.evaluate(f"""import('/scripts/api.js').then(({{ api }}) => {{
            const table = {{ rows: [], best: null, quickest: null, said: [] }};
            const of = {{ node: "1", prompt: "before", workflow: {workflow} }};
            api.dispatchCustomEvent("fastusp.measuring", {{ ...of, doing: "here", done: 1, total: 2, table }});
        }})""")

    values = node("FastUSPLoader", unet_name=DEV, weight_dtype="default", gpus="cpu:2", ulysses=0, ring=0)
    open_prompt(page, {"1": values, "2": values})
    told("'another'")
    assert page.evaluate(WINDOW) is None
    measure_js = "import('/extensions/ComfyUI-FastUSP/measure.js')"
    page.evaluate(f"{measure_js}.then(({{ measureHere }}) => measureHere(app.graph.getNodeById(2)))")
    told("app.graph.id")
    assert page.evaluate(LINE).startswith("Times steps")
    press(page, "Close")
    told("app.graph.id")
    assert page.evaluate(LINE) == "here"
    status = "api.dispatchCustomEvent('status', { exec_info: { queue_remaining: 0 } })"
    page.evaluate(f"import('/scripts/api.js').then(({{ api }}) => {{ {status}; }})")
    page.wait_for(f"{LINE}.startsWith('Measure again: ')", 10)
    press(page, "Close")
    assert page.evaluate(WINDOW) is None


def test_a_file_that_cannot_be_measured_is_refused_with_the_reason(host, page):
    loader(page, gpus="cpu:77")
    measure(page)
    page.wait_for(f"{LINE}.includes('Set 1 to 16 CPU ranks')")
    press(page, "Close")


def test_the_node_is_the_pages_alone(host):
    info = host.get("/object_info/FastUSPMeasure")["FastUSPMeasure"]
    assert (info["output_node"], info.get("dev_only", True)) == (True, True)
    inputs = [of for group in ("required", "optional") for of in info["input"][group].values()]
    assert all(options["tooltip"] for _, options in inputs)
