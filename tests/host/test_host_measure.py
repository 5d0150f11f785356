"""Measure here, of USP Loader: its window, its rows, what Apply writes, how it ends."""

import re
import time
from pathlib import Path

import pytest
from browser import PROGRAM, Page
from comfy import ComfyUI
from conversion import node, open_prompt
from ending import wait_for_the_end
from test_host_choose import UNDO, loader
from workflows import DEV, Graph

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

WINDOW = "document.querySelector('.fastusp-measure')"
LINE = f"({WINDOW}.querySelector('[role=status]').innerText)"
ROWS = f"[...{WINDOW}.querySelectorAll('tr')].slice(1).map(row => [...row.cells].map(cell => cell.innerText))"
SEEN = f"(({{ hidden, position }}) => [{LINE}, hidden, position])({WINDOW}.querySelector('progress'))"
CHANGES = re.compile(r"\d+\.\d\d %, latents \d+\.\d\d %")


def press(page: Page, label: str, within: str = WINDOW) -> None:
    buttons = f"[...{within}.querySelectorAll('button')]"
    page.evaluate(f"{buttons}.find(button => button.textContent.startsWith('{label}')).click()")


def measure(page: Page, *, exactness: bool = False) -> None:
    """Opens the window of the open workflow's loader, and presses Measure. exactness: with what 8 bits change."""
    page.wait_for("!!document.querySelector('.fastusp-choose')")
    press(page, "Measure here", "document.querySelector('.fastusp-choose')")
    page.evaluate(f"""{{
        const [width, height, steps, , verify] = {WINDOW}.querySelectorAll("input");
        [width.value, height.value, steps.value] = [64, 64, 1];
        if (verify.checked !== {str(exactness).lower()}) verify.click();
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


def assert_progress(seen: list) -> None:
    """The window names what is done, never what is over; its bar goes on from nothing to the end."""
    said = [line for line, hidden, _ in seen if not hidden]
    for phase in ("starting 1 worker(s) on cpu:1", "loading the model", "2 of 2", "comparing: exact values: "):
        assert any(phase in line for line in said), (phase, sorted({*said}))
    parts = [part for _, hidden, part in seen if not hidden]
    assert parts == sorted(parts) and parts[0] < 0.1 and parts[-1] > 0.9


def test_measured_and_applied(host, page):
    """Also by how much 8 bits change a step and the latents, of the rows that have some."""
    graph = Graph()
    graph.node("TestQuickMeasuring")
    graph.save(graph.sample(graph.usp("cpu:1"), steps=1))
    host.run(graph)
    before = starts(host)
    loader(page, batch_parallel="on")
    page.watch(f"{WINDOW} && {SEEN}")
    measure(page, exactness=True)
    page.wait_for(f"{LINE} == 'measured'", 150)
    assert_progress([seen for seen in page.seen() if seen])
    rows = page.evaluate(ROWS)
    assert [row[:5] for row in rows[:3]] == [
        ["1", "ulysses 1 x ring 1", "exact", "exact", "auto"],
        ["2", "ulysses 2 x ring 1", "exact", "exact", "auto"],
        ["2", "ulysses 2 x ring 1", "int8", "exact", "auto"],
    ]
    assert len(rows) == 7 and all(float(row[5]) > 0 and row[7].endswith(" MB") for row in rows)
    assert all(bool(CHANGES.fullmatch(row[8])) == (row[2:4] != ["exact", "exact"]) for row in rows), rows
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
