"""ComfyUI's page in a headless Chromium, driven over its debugging protocol."""

import functools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import websocket

from fastusp_backend.worker.process import die_with_parent

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SETTLED = "window.app?.extensionManager?.spinner === false && !!app.graph && !!document.querySelector('canvas')"
"""ComfyUI's application spins until it has opened its first workflow, which takes the place of any opened earlier."""

PAUSED = "app.canvas.pause_rendering = true"
"""Nodes are not drawn again in each step: by software that takes half of the time."""

CLEAR = """(async () => {
    const { extensionManager: open } = app;
    if (open.sidebarTab.activeSidebarTabId) open.sidebarTab.toggleSidebarTab(open.sidebarTab.activeSidebarTabId);
    await open.command.execute("Comfy.NewBlankWorkflow");
    open.toast.removeAll();
    app.canvas.pause_rendering = false;
})()"""

CONTRAST = """(() => {
    const rgb = text => text.match(/[0-9.]+/g).map(Number);
    const seen = node => {
        for (let at = node; at; at = at.parentElement) {
            const [r, g, b, a = 1] = rgb(getComputedStyle(at).backgroundColor);
            if (a > 0.9) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const texts = ['h3', 'p', 'td', 'th', 'li', 'small', 'button:enabled'].map(tag => `.fastusp ${tag}`).join();
    return Math.min(...[...document.querySelectorAll(texts)].map(node => {
        const [a, b] = [light(rgb(getComputedStyle(node).color)), light(seen(node))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }));
})()"""
"""Of the panel's texts, the least with what is behind them, as WCAG counts it."""


class Browser:
    """A browser of its own, which keeps what it has compiled of a page from tab to tab. profile: an empty folder."""

    def __init__(self, profile: Path):
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        command += [f"--user-data-dir={profile}", "--window-size=1400,900", "about:blank"]
        with open(profile / "browser.log", "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),  # a run of tests may be killed
            )
        try:
            self._address = f"http://127.0.0.1:{self._port(profile)}/json"
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _port(profile: Path) -> int:
        file, deadline = profile / "DevToolsActivePort", time.monotonic() + 30
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < deadline, (profile / "browser.log").read_text()[-2000:]
            time.sleep(0.1)
        return int(file.read_text().split()[0])

    def open(self) -> dict:
        """A tab, as the browser describes it."""
        request = urllib.request.Request(f"{self._address}/new?about:blank", method="PUT")
        return json.load(urllib.request.urlopen(request, timeout=30))

    def close_tab(self, tab: dict) -> None:
        urllib.request.urlopen(f"{self._address}/close/{tab['id']}", timeout=30).close()

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Page:
    """One tab of a browser, which remembers nothing of the tabs before."""

    def __init__(self, browser: Browser, url: str):
        self._browser, self.url, self._number = browser, url, 0
        self._tab = browser.open()
        self._socket = websocket.create_connection(self._tab["webSocketDebuggerUrl"], timeout=60)
        self._call("Page.enable")
        self._call("Storage.clearDataForOrigin", origin=url.rstrip("/"), storageTypes="all")
        self.load()

    def load(self) -> None:
        """Loads the page (again) and waits until ComfyUI's application is there."""
        self._call("Page.navigate", url=self.url)
        self.wait_for(SETTLED, 90)

    def clear(self) -> None:
        """Closes what tests have left open over an empty workflow: the side bar, dialogs, messages."""
        self.press("Escape", 27)
        self.evaluate(CLEAR)

    def evaluate(self, expression: str):
        """What an expression is, promises awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30):
        """Until an expression is true of the page; returns what it is then."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} is {value!r}"
            time.sleep(0.05)
        return value

    def watch(self, expression: str) -> None:
        """Notes what an expression is now and after each change of the page: who looks in intervals misses what is
        there shortly, and what comes last."""
        self.evaluate(f"""{{
            window.seen = [];
            const note = () => {{
                const found = JSON.stringify({expression});
                if (seen.at(-1) !== found) seen.push(found);
            }};
            note();
            window.watching?.disconnect(); // of a test before, on the same page
            window.watching = new MutationObserver(note);
            const changes = {{ childList: true, characterData: true, attributes: true }};
            watching.observe(document.body, {{ subtree: true, ...changes }});
        }} 0""")

    def seen(self) -> list:
        """What `watch` noted, in its order; it notes no more."""
        return self.evaluate("watching.disconnect(), seen.map(one => JSON.parse(one))")

    def resize(self, width: int, height: int) -> None:
        """What there is of the page, in its own pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def click(self, what: str) -> None:
        """With the mouse, in the middle of an element that is there and that nothing covers, once that is so."""
        x, y = self.wait_for(f"""(() => {{
            const found = {what};
            const {{ left, right, top, bottom }} = found?.getBoundingClientRect() ?? {{}};
            const at = [(left + right) / 2, (top + bottom) / 2];
            return found && right > left && found.contains(document.elementFromPoint(...at)) ? at : null;
        }})()""")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """A key, on what has the focus. code: the key's number."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def _call(self, method: str, **params):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._number:
            if answer.get("method") == "Page.javascriptDialogOpening":  # whether to leave what is not saved
                accept = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                self._socket.send(json.dumps(accept))
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        self._socket.close()
        self._browser.close_tab(self._tab)
