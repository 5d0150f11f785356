"""What the panel shows of what it is told, whatever the pools are at meanwhile."""

import json
import time

import pytest
from browser import PROGRAM
from conversion import node, open_prompt
from test_host_browser import PANEL, TOASTS, has, panel
from test_host_pages import ASKED, run
from workflows import DEV

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

POOLS = [{"state": state} for state in ("off", "starting", "idle", "busy", "stopping")]
POOLS += [
    {"state": "busy", "phase": phase, "phase_seconds": 999}
    for phase in ("starting 8 worker(s) on 0,1,2,3,4,5,6,7", "waiting for the workers", "loading the model")
]
POOLS.append({"state": "busy", "phase": "sampling", "phase_seconds": 9, "step": 100, "steps": 100})
POOLS[-1] |= {"ms_per_step": 99999.9, "seconds_left": 9999}


@pytest.fixture
def tell(host, page):
    """Tells the page an event; of pools ComfyUI itself tells it nothing meanwhile, which it else does when their memory
    has changed. Before, there is a pool in the panel."""
    host.run(run())
    panel(page)
    page.wait_for(has(PANEL, "Started"))

    def tell(event: str, detail: object = None) -> None:
        page.evaluate(f"telling = true, api.dispatchCustomEvent('{event}', {json.dumps(detail)}), telling = false")

    page.evaluate("""import('/scripts/api.js').then(({ api }) => {
        Object.assign(window, { api, telling: false, dispatches: EventTarget.prototype.dispatchEvent });
        EventTarget.prototype.dispatchEvent = function (event) {
            return (telling || !event.type.startsWith("fastusp.")) && dispatches.call(this, event);
        };
    })""")
    yield tell
    page.evaluate("EventTarget.prototype.dispatchEvent = dispatches, 0")
    tell("reconnected")


def test_what_is_open_is_told_again_to_a_comfyui_that_was_away(page, tell):
    time.sleep(1)  # until that it is open has been told
    page.evaluate("performance.clearResourceTimings()")
    tell("reconnecting")
    page.wait_for(has(PANEL, "ComfyUI does not answer."))
    tell("reconnected")
    page.wait_for(has(PANEL, "Started"))
    page.wait_for(f"['status', 'watch'].every(route => {ASKED}.some(name => name.endsWith(route)))")
    page.evaluate("app.extensionManager.sidebarTab.toggleSidebarTab('fastusp')")
    page.wait_for(f"{ASKED}.filter(name => name.endsWith('watch')).length == 2")


REFUSING = """
window.refusing = true, window.asks = window.fetch, window.fetch = (url, ...rest) =>
    window.refusing && String(url).includes("/fastusp/status")
        ? Promise.resolve(Response.json({ error: "no such session" }, { status: 500 }))
        : window.asks(url, ...rest), 0
"""


def test_a_refusal_is_told_and_not_the_last_question(page, tell):
    page.evaluate(REFUSING)
    try:
        tell("reconnected")
        page.wait_for(has(PANEL, "ComfyUI does not answer (no such session)."))
        page.evaluate("window.refusing = false, 0")
        page.wait_for(has(PANEL, "Started"))
    finally:
        page.evaluate("window.fetch = window.asks, 0")


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.get("phase") or pool["state"])
def test_what_a_pool_is_at_takes_two_lines_at_most(page, tell, pool):
    """At the side bar's first width, with the buttons that change it right below, in sight without scrolling however
    much follows."""
    run = {"ended": 0, "width": 1024, "height": 1024, "images": 1, "steps": 20, "seconds": 99.9, "ms_per_step": 999.9}
    run |= {"evaluations": 0, "phases": {"starting 8 worker(s) on 0,1,2,3,4,5,6,7": 20, "sampling": 79}}
    given = {
        "devices": "0,1,2,3,4,5,6,7",
        "ranks": 8,
        "gpus": [],
        "starts": 1,
        "history": [run] * 5,
        "error": "No\n" * 99,
    }
    tell("fastusp.pools", {"pools": [given | pool]})
    card = """document.querySelector('.fastusp section[aria-label="Pool on 0,1,2,3,4,5,6,7"]')"""
    state, buttons = f"{card}.querySelector('p')", f"[...{card}.querySelectorAll('.actions button')].slice(0, 4)"
    lines = f"{state}.getBoundingClientRect().height / parseFloat(getComputedStyle({state}).lineHeight)"
    assert 0.9 < page.evaluate(lines) < 2.1, page.evaluate(f"{state}.textContent")
    assert page.evaluate(f"Math.max(...{buttons}.map(button => button.getBoundingClientRect().bottom))") < 250


def test_a_panel_without_pools_says_how_to_come_to_one(host, page, tell):
    tell("fastusp.pools", {"pools": []})
    host.run(run())  # of which ComfyUI tells all pages
    first, second = (
        f"[...document.querySelectorAll('.fastusp button')].find(({{ innerText }}) => innerText == '{label}')"
        for label in ("Use FastUSP here", "Open templates")
    )
    open_prompt(page, {"1": node("UNETLoader", unet_name=DEV, weight_dtype="default")})
    page.evaluate("app.extensionManager.toast.removeAll()")
    page.click(first)
    page.wait_for(has(TOASTS, "FastUSP: nothing was changed"))  # its model goes nowhere
    page.click(second)
    page.wait_for(
        "[...document.querySelectorAll('[role=dialog]')].some(({ innerText }) => /Templates/.test(innerText))"
    )
    page.press("Escape", 27)


def test_what_gpus_do_is_on_the_card_when_it_is_sent(page, tell):
    pool = {"devices": "7", "ranks": 1, "gpus": [7], "starts": 1, "state": "off", "history": []}
    gpus = [{"index": 7, "used": 38_200_000_000, "total": 80_000_000_000, "utilisation": 97, "temperature": 64}]
    tell("fastusp.pools", {"pools": [pool]})
    tell("fastusp.loads", {"gpus": gpus})
    page.wait_for(has(PANEL, "97 % busy, 38.2 GB of 80.0 GB in use, 64 °C"), 5)
    tell("reconnected")
    page.wait_for(f"!{has(PANEL, '97 % busy')}")
