"""Two pages of one ComfyUI, which are sent what changes and ask for nothing again and again; what cards say of CPU
ranks; commands, and copying where the browser has no clipboard for the page."""

import itertools
import time
from contextlib import closing

import pytest
from browser import PROGRAM, Page
from conversion import node, open_prompt, user
from ending import held_up
from test_host_browser import LOG, PANEL, STATE, TOASTS, button, choose, has, panel, queue
from test_host_choose import TOLD, loader
from test_host_measure import LINE, ROWS, WINDOW, measure, press
from workflows import DEV, Graph

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

SEEDS = itertools.count(740)
ASKED = """performance.getEntriesByType('resource').filter(({ startTime }) => startTime > (window.since ?? 0))
    .map(({ name }) => name).filter(name => name.includes('fastusp/'))"""
"""What was asked for, since `window.since` where that is set: what began before may be listed later, when it ends."""
CARD = """document.querySelector('.fastusp section[aria-label="Pool on cpu:1"]')"""
STARTING = "starting 1 worker(s) on cpu:1"


@pytest.fixture
def other(page, browser):
    """The host's page once more."""
    with closing(Page(browser, page.url)) as other:
        yield other


def run(gpus: str = "cpu:1", **inputs) -> Graph:
    """One that ComfyUI has not run yet."""
    graph = Graph()
    given = {"latent_image": graph.empty(96, 64), "steps": 2, "seed": next(SEEDS)} | inputs
    graph.save(graph.sample(graph.usp(gpus), **given))
    return graph


def test_two_pages_of_one_pool(host, page, other):
    """Both follow a run of one of them, and what is done in one is told in the other. Runs of both at once start
    workers once; the seconds of that phase are counted on the card."""
    host.run(run())
    for each in (page, other):
        panel(each)
    starts = host.pool("cpu:1")["starts"]
    queue(other, run(steps=3))
    for each in (page, other):
        each.wait_for(f"/96 x 64: 3 steps in [0-9.]+ s/.test({PANEL}) && {has(STATE, 'idle: warm')}", 60)
    assert host.pool("cpu:1")["starts"] == starts
    other.evaluate(f"({button('Stop', 'cpu:1')}).click()")
    for each in (page, other):
        each.wait_for(has(STATE, "off: starts with the next run"))
        each.wait_for(has(TOASTS, "the workers on cpu:1 were stopped"))
    other.watch(STATE)
    with held_up(host.process.pid, seconds=2.5):  # a start may take less than the seconds that are to be counted
        for each in (page, other):
            queue(each, run(steps=5))
    for each in (page, other):
        each.wait_for(f"{PANEL}.split('96 x 64: 5 steps').length == 3 && {has(STATE, 'idle: warm')}", 60)
    assert host.pool("cpu:1")["starts"] == starts + 1
    states = other.seen()
    counted = [int(state.split("(")[-1].removesuffix(" s)")) for state in states if state.startswith(f"{STARTING} (")]
    assert len(counted) > 2 and counted == sorted(set(counted)), states


def test_pages_ask_for_nothing_again_and_again(host, page):
    """Neither while a pool is idle nor in a run, with the panel and the log open: they are sent steps, lines of the
    log, and what happens to a pool of which nobody tells."""
    panel(page)
    page.evaluate("app.extensionManager.command.execute('FastUSP.log')")
    host.run(run())
    choose(page, "cpu:1")
    page.wait_for(has(LOG, "(Sample)"))
    lines = page.evaluate(f"({LOG}).split('\\n').length")
    page.evaluate("performance.clearResourceTimings(), window.since = performance.now(), 0")
    page.watch(STATE)
    host.run(run(steps=400, latent_image=None))  # some seconds, of which the page is told a few times
    page.wait_for(f"/64 x 64: 400 steps in [0-9.]+ s/.test({PANEL}) && ({LOG}).split('\\n').length > {lines}")
    host.post("/free", {"unload_models": True})
    page.wait_for(has(PANEL, "released: loads with the next run"))
    time.sleep(2)
    assert page.evaluate(ASKED) == []
    states = page.seen()
    assert any(state.startswith("step ") for state in states), states
    written = host.get("/fastusp/pools/log?devices=cpu:1")["lines"]
    assert page.evaluate(f"({LOG}).trim().split('\\n')") == written
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.fastusp-log')")
    page.wait_for(f"{ASKED}.map(name => name.split('/').at(-1)) == 'watch'")  # that it is closed


def test_a_cpu_ranks_threads_and_memory_are_on_its_card(host, page):
    host.run(run())
    panel(page)
    rows = f"[...({CARD}?.querySelectorAll('tr') ?? [])].map(row => [...row.cells].map(cell => cell.textContent))"
    (pid,) = host.pool("cpu:1")["pids"]
    page.wait_for(
        f"{rows}.some(([name, text]) => name == 'Rank 0' && "
        f"/^cpu \\(1 thread\\), process {pid}\\n[0-9.]+ [MG]B of memory$/.test(text))"
    )


def test_a_new_loaders_texts_fit_it(page, renderer):
    """What it would come to, and what is wrong, at the size that ComfyUI gives it, without scrolling."""
    box = "document.querySelector('.fastusp-choose')"
    for file, begins in ((DEV, "no times known for CPU ranks"), ("flux1-dev-of-theirs.safetensors", "unet_name: ")):
        loader(page, unet_name=file)
        page.wait_for(f"({TOLD}).includes('{begins}')")
        assert page.evaluate(f"{box}.scrollHeight <= {box}.clientHeight"), page.evaluate(TOLD)


def test_what_to_do_is_in_the_first_two_lines_of_comfyuis_own_message(page):
    """Of a layout that cannot be: the legal ones, before it is cut."""
    graph = Graph()
    graph.save(graph.sample(graph.usp(ulysses=3, ring=1), steps=1))
    queue(page, graph)
    lines = page.wait_for("""(() => {
        const said = [...document.querySelectorAll("p, div, span")].find(({ children, textContent }) =>
            !children.length && /^USP Loader.*Set 0, or a legal layout/.test(textContent));
        if (!said) return 0;
        const remedy = new Range();
        remedy.setStart(said.firstChild, 0);
        remedy.setEnd(said.firstChild, said.textContent.indexOf("ulysses 1 x ring 2)") + 19);
        return remedy.getBoundingClientRect().height / parseFloat(getComputedStyle(said).lineHeight);
    })()""")
    assert lines < 2.1
    page.evaluate("app.extensionManager.toast.removeAll()")


def test_copied_where_the_browser_has_no_clipboard_for_the_page(host, page):
    """As for a page of another machine without https."""
    host.run(run())
    panel(page)
    page.evaluate("""{
        window.hidden = Object.getOwnPropertyDescriptor(Navigator.prototype, "clipboard");
        Object.defineProperty(Navigator.prototype, "clipboard", { get: () => undefined, configurable: true });
        document.addEventListener("copy", ({ target }) => window.copied = target.value);
    } 0""")
    try:
        page.evaluate(f"window.copied = null, ({button('Copy report', 'cpu:1')}).scrollIntoView()")
        page.click(button("Copy report", "cpu:1"))
        assert "Rank 0: cpu (1 thread)" in page.wait_for("window.copied")
        page.wait_for(has(TOASTS, "FastUSP: report copied"))
        assert page.evaluate("document.querySelectorAll('body > textarea').length") == 0, "what was copied from is gone"
    finally:
        page.evaluate("Object.defineProperty(Navigator.prototype, 'clipboard', hidden), 0")


def loader_in_a_box(page) -> str:
    """Opens a workflow with a loader in a subgraph, and that; what its box is."""
    values = {"unet_name": DEV, "weight_dtype": "default", "gpus": "cpu:1", "ulysses": 0, "ring": 0}
    open_prompt(page, {"1": node("FastUSPLoader", **values), "2": node("FastUSPSettings", linear="fp8")})
    user(page, "of(2).connect(0, of(1), 'settings'); box(1, 'gpus')")
    box = "app.rootGraph.nodes.find(node => node.subgraph)"
    page.evaluate(f"app.canvas.openSubgraph({box}.subgraph, {box})")
    return box


def kinds(prompt: dict) -> dict[str, str]:
    return {each["class_type"]: number for number, each in prompt.items()}


def test_a_loader_in_a_subgraph_is_measured(host, page):
    """Under the number that its box gives it, with its settings, which are outside."""
    box = loader_in_a_box(page)
    measure(page)
    page.wait_for(f"{LINE}.includes('starting 1 worker(s) on cpu:1')", 60)
    ((_, _, running, *_),) = host.get("/queue")["queue_running"]
    assert kinds(running) == {"FastUSPMeasure": f"{page.evaluate(f'{box}.id')}:1", "FastUSPSettings": "2"}
    press(page, "Cancel")
    page.wait_for(f"{LINE}.startsWith('cancelled: ')", 30)
    press(page, "Close")


@pytest.mark.thorough
def test_a_loader_in_a_subgraph_is_set(page):
    """Apply writes where the box shows the value."""
    box = loader_in_a_box(page)
    measure(page)
    page.wait_for(f"{LINE} == 'measured'", 90)
    first, *_ = page.evaluate(ROWS)
    assert first[:5] == ["1", "ulysses 1 x ring 1", "exact", "exact", "auto"] and float(first[5]) > 0
    gpus = f"{box}.widgets.find(({{ name }}) => name == 'gpus')"
    page.evaluate(f"{gpus}.value = 'cpu:2'")
    press(page, "Apply", f"{WINDOW}.querySelectorAll('tr')[1]")
    assert page.evaluate(f"{gpus}.value") == "cpu:1"
    prompt = page.evaluate("app.graphToPrompt().then(({ output }) => Object.values(output))")
    set_to = {"FastUSPLoader": ("gpus", "cpu:1"), "FastUSPSettings": ("linear", "exact")}
    assert {each["class_type"]: each["inputs"][set_to[each["class_type"]][0]] for each in prompt} == {
        kind: value for kind, (_, value) in set_to.items()
    }
    press(page, "Close")
