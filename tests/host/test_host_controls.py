"""What the page has done to pools: the buttons of a card, pressed with the mouse, and commands that keys can be
bound to."""

import pytest
from browser import PROGRAM, Page
from test_host_browser import PANEL, STATE, TOASTS, button, copied, has, in_mid_run, panel, short

pytestmark = [pytest.mark.host, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]


def command(page: Page, name: str) -> None:
    page.evaluate(f"app.extensionManager.command.execute('FastUSP.{name}')")


def pressed(page: Page, label: str) -> None:
    page.wait_for(f"({button(label, 'cpu:1')})?.disabled === false", 60)
    page.evaluate(f"app.extensionManager.toast.removeAll(), ({button(label, 'cpu:1')}).scrollIntoView()")
    page.click(button(label, "cpu:1"))


def test_buttons_that_release_and_restart(host, page):
    """What workers that start write, their last line, is below the phase and its seconds until they are ready."""
    host.run(short("cpu:1"))
    panel(page)
    (pid,) = host.pool("cpu:1")["pids"]
    page.wait_for(has(PANEL, "on the devices, at most "))
    pressed(page, "Release memory")
    page.wait_for(has(PANEL, "released: loads with the next run"))
    page.wait_for(has(TOASTS, "memory on cpu:1 was released"))
    assert (host.pool("cpu:1")["held"], host.pool("cpu:1")["pids"]) == ("none", [pid]), "its worker stays"
    starts = host.pool("cpu:1")["starts"]
    line = f"""(({STATE}) + ": " + {STATE.replace(" p'", " .line'")})"""
    page.watch(line)
    pressed(page, "Restart")
    page.wait_for(has(TOASTS, "new workers on cpu:1"))
    page.wait_for(f"seen.length > 1 && {line} == 'idle: warm, waiting for a run: '", 60)
    assert "starting: [torchrun] importing torch" in page.seen()
    assert host.pool("cpu:1")["starts"] == starts + 1 and host.pool("cpu:1")["pids"] != [pid]
    assert host.run(short("cpu:1")).latents


def test_commands_that_keys_can_be_bound_to(host, page):
    panel(page)
    host.run(short("cpu:1"))
    command(page, "release")
    page.wait_for(has(PANEL, "released: loads with the next run"))
    page.wait_for(has(TOASTS, "memory on cpu:1 was released"))
    in_mid_run(page)
    before = host.pool("cpu:1")
    command(page, "interrupt")
    page.wait_for(has(STATE, "idle: warm, waiting for a run"))
    assert host.pool("cpu:1")["pids"] == before["pids"] and not host.get("/queue")["queue_running"]
    command(page, "restart")
    page.wait_for(has(TOASTS, "new workers on cpu:1"))
    page.wait_for(has(PANEL, "idle: warm, waiting for a run"), 60)
    assert host.pool("cpu:1")["starts"] == before["starts"] + 1


def test_commands_that_stop_and_report(host, page):
    host.run(short("cpu:1"))
    report = copied(page, "{ click: () => app.extensionManager.command.execute('FastUSP.report') }")
    assert "FastUSP " in report and "Log:" in report
    command(page, "stop")
    page.wait_for(has(TOASTS, "the workers on cpu:1 were stopped"))
    assert {pool["state"] for pool in host.get("/fastusp/status")["pools"]} == {"off"}
    command(page, "stop")
    page.wait_for(has(TOASTS, "There is no pool that this changes"))
