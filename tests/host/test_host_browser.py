"""The page itself, in a headless browser: what it shows again when it is loaded in mid-run, the panel, the workers'
log, and what is told of what happens to them."""

import itertools
import json
import os
import signal

import pytest
from browser import CONTRAST, PAUSED, PROGRAM, Page
from workflows import IN_WORKERS, Graph

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

TEXTS = """app.graph.nodes.flatMap(node => (node.widgets ?? []).filter(widget => widget.name == "$$node-text-preview")
    .map(widget => `${node.type}: ${widget.value}`)).join("; ")"""
DRAWN_ABOVE = "[...document.querySelectorAll('.dom-widget')].map(({ innerText }) => innerText).join()"
PANEL = 'document.querySelector(".fastusp")?.innerText'
STATE = """document.querySelector('.fastusp section[aria-label="Pool on cpu:1"] p').textContent"""
LOG = "document.querySelector('.fastusp-log pre')?.textContent"
TOASTS = "document.querySelector('.p-toast')?.innerText"

SEEDS = itertools.count(340)


def has(where: str, text: str) -> str:
    return f"({where} ?? '').includes({json.dumps(text)})"


def queue(page: Page, graph: Graph) -> None:
    """As a workflow of its own, with an id, as if it were opened from a file."""
    page.evaluate(f"app.loadApiJson({json.dumps(graph)}, 'words')")
    page.evaluate("app.loadGraphData(app.graph.serialize())")
    page.evaluate("app.queuePrompt(0, 1)")


def test_a_reload_in_the_middle_of_a_run(host, page):
    host.run(short("cpu:1"))  # workers that start may take longer than anything that is waited for here
    queue(page, endless(page))
    page.wait_for(has(TEXTS, IN_WORKERS), 60)
    try:
        page.load()
        page.evaluate(PAUSED)
        page.wait_for(has(TEXTS, IN_WORKERS), 60)
        page.evaluate("""(async () => {
            const other = app.graph.serialize();
            other.id = "11111111-2222-3333-4444-555555555555";
            await app.loadGraphData(other);
            await new Promise(done => setTimeout(done, 1000));
        })()""")
        assert page.evaluate(TEXTS) == "", "on the nodes of another workflow, which happen to have the same numbers"
    finally:
        host.post("/interrupt", {})


def test_what_a_run_says_is_drawn_on_its_node(host, page, renderer):
    """In Nodes 2.0 the node is in the page; on the canvas the text lies above it."""
    graph = Graph()
    sampler = graph.sample(graph.usp("cpu:1"), steps=2, seed=next(SEEDS))
    graph.save(sampler)
    queue(page, graph)
    drawn = f"document.querySelector('[data-node-id=\"{sampler[0]}\"]')?.innerText" if renderer else DRAWN_ABOVE
    page.wait_for(has(drawn, f"FastUSP: ulysses 1 x ring 1 on cpu:1, {IN_WORKERS}"), 60)
    assert page.evaluate("!!document.querySelector('[data-node-id]')") == renderer


def test_found_by_what_people_search_for(page):
    found = "[...document.querySelectorAll('[role=option]')].map(found => found.innerText).join()"
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for("document.activeElement.role == 'combobox'")
    page.type("multi gpu")
    page.wait_for(has(found, "USP Loader"))
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for(f"!({found})")


def test_a_run_of_another_page_shows_nothing_here(host, page):
    """On nodes that happen to have the same numbers."""
    graph = Graph()
    graph.save(graph.sample(graph.usp("cpu:1"), steps=2, seed=323))
    page.evaluate(f"app.loadApiJson({json.dumps(graph)}, 'words')")
    assert any(IN_WORKERS in text for _, text in host.run(graph).texts)
    page.evaluate("new Promise(done => setTimeout(done, 500))")
    assert IN_WORKERS not in page.evaluate(TEXTS)


def test_an_error_on_the_node_and_in_the_panel(host, page):
    graph = Graph()
    positive = graph.node("TestSeededConditioning", seed=1, tokens=7, width=2048, guidance=3.5)
    graph.save(graph.sample(graph.usp(), steps=2, positive=positive))
    queue(page, graph)
    page.wait_for(has(TEXTS, "KSampler: FastUSP: failed: "), 60)
    error = host.pool("cpu:2")["error"]
    page.wait_for(f"{has(TOASTS, error)} && {has(TOASTS, 'FastUSP: the run failed')}")
    panel(page)
    page.wait_for(has(PANEL, error))
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
    page.wait_for(f"/256 x 256: 3 steps in [0-9.]+ s, [0-9.]+ ms a step/.test({PANEL})", 60)
    focused = f"({button('Stop', 'cpu:1')}).focus(), document.activeElement.textContent"
    assert page.evaluate(focused) == "Stop"
    in_mid_run(page)
    page.evaluate(f"({button('Interrupt', 'cpu:1')}).click()")
    page.wait_for(f"{has(STATE, 'idle: warm')} && ({button('Interrupt', 'cpu:1')}).disabled")
    in_mid_run(page)
    assert page.evaluate("document.activeElement.textContent") == "Stop", "what is focused stays in the page"
    assert page.evaluate(f"({button('Release memory', 'cpu:1')}).disabled") is True
    page.press("Tab", 9)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(f"document.activeElement.textContent + ' ' + {outline}") == "Restart solid"
    page.evaluate(focused)
    page.press("Enter", 13)
    page.wait_for(has(PANEL, "they were stopped from the page"), 30)
    page.wait_for(has(TOASTS, "they were stopped from the page"))
    assert host.pool("cpu:1")["state"] == "off"


def test_what_gpus_do_is_told(host, page):
    """As NVML tells it; there are none here."""
    assert host.get("/fastusp/gpus") == {"gpus": []} or host.get("/fastusp/gpus")["gpus"]
    told = {"used": 38_200_000_000, "total": 80_000_000_000, "utilisation": 97, "temperature": 64}
    loads = [told | {"index": 0}, told | {"index": 1}, dict.fromkeys(told) | {"index": 2}]
    memory = {"weights": 20_600_000_000, "own": 20_650_000_000, "free": 53_000_000_000, "total": 80_000_000_000}
    pool = {"devices": "0,2", "ranks": 2, "gpus": [0, 2], "starts": 1, "state": "idle", "history": []}
    pool |= {"names": ["NVIDIA H200"] * 2, "pids": [8, 9], "memory": [memory, None], "backend": "nccl", "torch": "2.11"}
    page.evaluate(f"""import('/extensions/ComfyUI-FastUSP/card.js').then(({{ Card }}) => {{
        window.card = new Card("0,2");
        card.show({json.dumps(pool)}, {json.dumps(loads)}, []);
    }})""")
    rows = page.evaluate("[...card.section.querySelectorAll('tr')].map(row => row.cells[1].textContent)")
    rank = "NVIDIA H200, process 8\nweights 20.6 GB, buffers 50 MB, other 6.3 GB, free 53.0 GB"
    assert rows[1:5] == ["97 % busy, 38.2 GB of 80.0 GB in use, 64 °C", "", rank, "NVIDIA H200, process 9"]
    grown = "[...card.section.querySelectorAll('.memory span')].map(piece => piece.style.flexGrow / 1e9)"
    assert page.evaluate(grown) == pytest.approx([20.6, 0.05, 6.35, 53.0])
    assert all(rank["own"] > 1e7 and rank["total"] > rank["free"] for rank in host.pool("cpu:2")["memory"])


def test_the_workers_log(host, page):
    """As they write it; of the pool that is chosen; copied whole."""
    host.run(short("cpu:1"))
    page.evaluate("app.extensionManager.command.execute('FastUSP.log')")
    choose(page, "cpu:2")
    page.wait_for(has(LOG, "[rank 1]"))
    panel(page)
    page.evaluate(f"({button('Show log', 'cpu:1')}).click()")
    page.wait_for(f"{has(LOG, 'rank 0 of 1 on cpu')} && !{has(LOG, '[rank 1]')}")
    lines = page.evaluate(LOG).count("(Sample)")
    host.run(short("cpu:1"))
    page.wait_for(f"{LOG}.split('(Sample)').length > {lines + 1}")
    assert copied(page, "document.querySelector('.fastusp-log button')") in page.evaluate(LOG)
    inside = "document.querySelector('.fastusp-log pre').getBoundingClientRect().bottom < innerHeight"
    assert page.evaluate(inside), "its end is in sight"
    focusable = "[...document.querySelectorAll('.fastusp-log select, .fastusp-log button, .fastusp-log pre')]"
    assert page.evaluate(f"{focusable}.every(node => node.tabIndex == 0)")
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.fastusp-log')")
    page.wait_for(f"!({LOG})")


def choose(page: Page, devices: str) -> None:
    pools = "document.querySelector('.fastusp-log select')"
    page.wait_for(f"[...{pools}?.options ?? []].some(option => option.value == {json.dumps(devices)})")
    page.evaluate(f"{pools}.value = {json.dumps(devices)}, {pools}.dispatchEvent(new Event('change'))")


def copied(page: Page, what: str) -> str:
    """What a button puts on the clipboard."""
    page.evaluate("window.copied = null; navigator.clipboard.writeText = async text => void (window.copied = text)")
    page.evaluate(f"({what}).click()")
    return page.wait_for("window.copied")


def test_workers_that_die_are_told_and_reported(host, page):
    """While nobody asks anything of them: the card says why, with the last log lines, until a run ends well."""
    host.run(short("cpu:1"))
    panel(page)
    pid = host.pool("cpu:1")["pids"][0]
    os.kill(pid, signal.SIGKILL)
    died = f"rank 0 (process {pid}) was ended by SIGKILL"
    page.wait_for(has(TOASTS, died))
    page.wait_for(has(PANEL, died))
    assert "Last log lines:" in page.evaluate(PANEL)
    report = copied(page, button("Copy report", "cpu:1"))
    parts = "ComfyUI ", "FastUSP ", "Python ", "PyTorch ", "Rank 0: cpu", "Layout: ", "dev.safetensors", "Log:"
    for part in (*parts, died):
        assert part in report, report
    assert str(host.base) not in report and str(host.path) not in report and "/models/" not in report
    host.run(short("cpu:1"))
    page.wait_for(f"!{has(PANEL, died)} && /starting 1 worker.s. on cpu:1 [0-9.]+ s/.test({PANEL})")


@pytest.mark.thorough
def test_workers_that_die_in_a_run_are_told_once(host, page):
    """By the pool, not by the run as well."""
    panel(page)
    in_mid_run(page)
    pid = host.pool("cpu:1")["pids"][0]
    os.kill(pid, signal.SIGKILL)
    page.wait_for(has(TOASTS, f"stopped while a prompt ran: rank 0 (process {pid}) was ended"), 60)
    page.evaluate("new Promise(done => setTimeout(done, 500))")
    assert page.evaluate(TOASTS).count(f"process {pid}") == 1


def test_steps_of_comfyui_count_too(host, page):
    """The pool is busy in all of them, and the node says why, by the menu's name."""
    panel(page)
    graph = Graph()
    model = graph.node("TestAfterEveryEvaluation", model=graph.usp("cpu:1"), seconds=0.3, error="")
    graph.save(graph.sample(model, steps=5, seed=330, sampler_name="uni_pc_bh2"))
    queue(page, graph)
    page.wait_for(f"/step [1-4] of 5, [0-9.]+ ms a step/.test({STATE})", 60)
    page.watch(STATE)
    assert "stepping (no uni_pc_bh2 in the workers)" in page.evaluate(TEXTS)
    page.wait_for(f"/64 x 64: 5 steps in [0-9.]+ s, [0-9.]+ ms a step/.test({PANEL}) && {has(STATE, 'idle')}")
    states = page.seen()
    assert all(state.startswith("step ") for state in states[:-1]) and states[-1].startswith("idle"), states
    assert host.pool("cpu:1")["history"][0]["ms_per_step"] > 250


def test_runs_on_one_rank_and_on_two_are_compared(host, page):
    panel(page)
    for gpus in ("cpu:1", "cpu:2"):
        graph = Graph()
        graph.save(graph.sample(graph.usp(gpus), steps=2, seed=331, latent_image=graph.empty(96, 64)))
        host.run(graph)
    page.wait_for(f"/96 x 64: 2 steps in [^]*, [0-9.]+ times as fast as on cpu:1/.test({PANEL})")


def test_runs_in_8_bits_and_runs_that_skip_steps_are_compared_with_no_others(page):
    exact = {"ended": 0, "width": 64, "height": 64, "images": 1, "cfg": 1, "model": "m", "steps": 8, "seconds": 1}
    exact |= {"ms_per_step": 9, "evaluations": 0, "skipped": 0, "eight_bits": "", "phases": {}}
    one, two = ({"devices": f"cpu:{n}", "ranks": n, "gpus": [], "history": [exact]} for n in (1, 2))
    for change in ({}, {"eight_bits": "int8"}, {"ms_per_step": None}, {"sampler": "heun"}, {"storage": "fp8"}):
        given = ", ".join(json.dumps(each) for each in (exact | change, two, [one, two]))
        imported = "import('/extensions/ComfyUI-FastUSP/card.js')"
        line = page.evaluate(f"{imported}.then(({{ runLines }}) => runLines({given})[0])")
        assert ("times as fast" in line) == (not change) and "skipped" not in line
    skipping = json.dumps(exact | {"ms_per_step": None, "evaluations": 8, "skipped": 3})
    line = page.evaluate(f"{imported}.then(({{ runLines }}) => runLines({skipping}, {json.dumps(two)}, [])[0])")
    assert line.endswith("3 of 8 evaluations skipped")


def test_themes_narrow_bars_and_the_keyboard(host, page):
    host.run(short("cpu:1"))
    panel(page)
    page.wait_for(has(PANEL, "Last runs"))
    for theme in ("light", "dark"):
        page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{theme}')")
        page.wait_for(f"{CONTRAST} >= 4", 5)
    root = "document.querySelector('.fastusp')"
    page.evaluate(f"{root}.style.width = '180px'")
    cell = "getComputedStyle(document.querySelector('.fastusp td')).display"
    assert page.evaluate(cell) == "block", "below its name, not in a column of four letters"
    wider = f"[...{root}.querySelectorAll('*:not(.spoken)')].filter(node => node.scrollWidth > {root}.clientWidth)"
    assert page.evaluate(f"{wider}.map(node => node.outerHTML)") == []
    page.evaluate(f"{root}.style.width = ''")
    reached = "[...document.querySelectorAll('.fastusp button, .fastusp pre')].every(node => node.tabIndex == 0)"
    assert page.evaluate(reached)
    announced = "[...document.querySelectorAll('.fastusp [role=status]')].map(node => node.textContent)"
    assert "cpu:1: idle: warm, waiting for a run" in page.evaluate(announced)


def endless(page: Page) -> Graph:
    """On one core; the page wants the other, and is not drawn."""
    page.evaluate(PAUSED)
    graph = Graph()
    given = {"latent_image": graph.empty(384, 384), "positive": graph.prompt(1, 256)}
    graph.save(graph.sample(graph.usp("cpu:1"), steps=4000, seed=next(SEEDS), **given))
    return graph


def in_mid_run(page: Page) -> None:
    """Of a long one on cpu:1, as the panel shows it."""
    queue(page, endless(page))
    page.wait_for(f"/step [0-9]+ of 4000, [0-9.]+ ms a step, [0-9]+ s left/.test({PANEL})", 60)


def short(gpus: str) -> Graph:
    """One that ComfyUI has not run yet."""
    graph = Graph()
    graph.save(graph.sample(graph.usp(gpus), steps=1, seed=next(SEEDS)))
    return graph
