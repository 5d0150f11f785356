"""What people see of the pools: a line of text on the running node and in ComfyUI's log, and routes for the page."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar

from aiohttp import web

from ..fastusp_backend.devices import gpu_loads
from ..fastusp_backend.errors import DeviceError
from .answers import FOREIGN, foreign, refused
from .comfyui import PromptServer, get_executing_context, model_management
from .pools import all_pools, on_change

log = logging.getLogger(__name__)

SHORT = 80
"""More characters do not fit on a wide node: why a run steps from ComfyUI is cut there."""
ERROR = 100
"""What is shown of an error, of which ComfyUI shows the whole."""

PUSH_SECONDS = 0.2
"""Between two times that the page is sent how far runs are."""

_pushed = 0.0
_sent: list[dict] = []
"""What the pages were sent last, less what goes on by itself."""

_logged = ""
"""The last line. A phase is not logged twice: a sampler that steps from ComfyUI reports at each step."""

_shown: tuple[str | None, dict[str, str]] = None, {}
"""The last prompt whose nodes showed something, and what each of them shows. Never changed, only replaced: the page
asks on another thread."""


class NodeStatus:
    """The status line of the executing node: a headline that stays, and what covers it for a while.

    reason: why the run goes as the headline says, for the log; the node shows what fits.
    """

    def __init__(self, headline: str, reason: str = ""):
        whole = f"{headline} ({reason})" if reason else headline
        _log(whole, again=True)
        self._headline = shortened(whole, SHORT) if reason else headline
        self._covered = False
        _show(self._headline)

    def phase(self, text: str) -> None:
        self.cover(f"FastUSP: {text}")
        _log(f"FastUSP: {text}")

    def cover(self, text: str) -> None:
        self._covered = True
        _show(text)

    def overwritten(self) -> None:
        """The node shows something else, which is over."""
        self._covered = True

    def restore(self) -> None:
        """Shows the headline again, if something covers it."""
        if self._covered:
            self._covered = False
            _show(self._headline)


_current: ContextVar[NodeStatus | None] = ContextVar("fastusp_node_status", default=None)


def set_headline(text: str, *, reason: str = "") -> None:
    """Starts a new status line for what the executing node does now, and why."""
    _current.set(NodeStatus(f"FastUSP: {text}", reason))


def node_status() -> NodeStatus:
    """The current status line; one is begun where a model is called outside of any sampler."""
    if _current.get() is None:
        set_headline("evaluating in the workers")
    return _current.get()


@contextlib.contextmanager
def node_run(beginning: str = "preparing") -> Iterator[None]:
    """What the executing node does from here to the end has a status line of its own; see `ends_told`."""
    outer = _current.get()
    token = _current.set(None)
    try:
        with ends_told():
            _show(f"FastUSP: {beginning}")
            yield
    finally:
        _current.reset(token)
        if outer is not None:
            outer.overwritten()


@contextlib.contextmanager
def ends_told() -> Iterator[None]:
    """The status line says so where what is inside ends with an error, anybody's, or with an interruption."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, model_management.InterruptProcessingException):
            text = "interrupted"
        else:
            text = shortened(f"failed: {first_line(error)}", ERROR)
        status = _current.get()
        (status.cover if status is not None else _show)(f"FastUSP: {text}")
        raise


def show(text: str) -> None:
    """Shows a text on the executing node alone, not in the log."""
    _show(f"FastUSP: {text}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text; where it has none, its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shortened(text: str, length: int) -> str:
    """Shortens a text to at most so many characters, cut between words where there is one to cut at."""
    if len(text) <= length:
        return text
    cut = text[: length - 4]
    return (cut.rpartition(" ")[0] or cut).rstrip(" :,(") + " ..."


def _log(text: str, *, again: bool = False) -> None:
    """Logs a text that is news, or again."""
    global _logged
    if again or text != _logged:
        _logged = text
        log.info("%s", text)


def _show(text: str) -> None:
    """Sends a text to the page whose prompt runs. Where no node is executing (a script), or no page has queued the
    prompt, there is nobody to show it to."""
    global _shown
    context = get_executing_context()
    if context is None:
        return
    server = PromptServer.instance
    prompt, texts = _shown
    _shown = context.prompt_id, (texts if prompt == context.prompt_id else {}) | {context.node_id: text}
    if server.client_id is not None:
        server.send_progress_text(_as_text(text), context.node_id, server.client_id)


def _as_text(text: str) -> str:
    """The page takes these lines for HTML, and [[...]] for links."""
    return text.replace("<", "‹").replace(">", "›").replace("[[", "[ [")


def workflow_id(png: object) -> str | None:
    """The id of the workflow that a prompt was queued with, for pictures' metadata; None where whoever queued it gave
    none."""
    workflow = png.get("workflow") if isinstance(png, dict) else None
    return workflow.get("id") if isinstance(workflow, dict) else None


def _running_texts(client: str | None) -> dict:
    """texts: what the nodes of `client`'s running prompt show, by id; workflow: the id of the graph that they are of,
    where the client named it."""
    prompt, texts = _shown
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    for _number, number, _prompt, extra, *_ in running:
        if number == prompt and client and extra.get("client_id") == client:
            shown = {node: _as_text(text) for node, text in texts.items()}
            return {"workflow": workflow_id(extra.get("extra_pnginfo")), "texts": shown}
    return {"workflow": None, "texts": {}}


def push_pools(*, now: bool = True) -> None:
    """Sends all pages what the pools are at. now: also where they were told a moment ago."""
    global _pushed, _sent
    moment = time.monotonic()
    if now or moment - _pushed >= PUSH_SECONDS:
        told = _pools()
        _pushed, _sent = moment, _lasting(told)
        PromptServer.instance.send_sync("fastusp.pools", told)


def push_changes() -> None:
    """Does as `push_pools` where something has changed of which nobody has told, such as workers that have come to the
    end of what was cancelled."""
    if _lasting(_pools()) != _sent:
        push_pools()


def _pools() -> dict:
    return {"pools": [pool.status() for pool in all_pools()]}


def _lasting(told: dict) -> list[dict]:
    """The pools without the seconds that pages count themselves."""
    return [{key: value for key, value in pool.items() if key != "phase_seconds"} for pool in told["pools"]]


def add_routes() -> None:
    """GET /fastusp/status: the pools, as `Pool.status` gives them. GET /fastusp/gpus: what the GPUs do just now, as
    `nvml.loads` does. GET /fastusp/texts?client=ID: the status lines of that client's running prompt, for a page that
    was loaded anew. None changes anything; pages of other sites are refused: errors tell of files."""
    on_change(push_pools)
    routes = PromptServer.instance.routes

    @routes.get("/fastusp/status")
    async def status(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        return web.json_response(_pools())

    @routes.get("/fastusp/gpus")
    async def gpus(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        try:
            return web.json_response({"gpus": await asyncio.to_thread(gpu_loads)})
        except DeviceError as error:
            return web.json_response({"gpus": [], "error": str(error)})

    @routes.get("/fastusp/texts")
    async def texts(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        return web.json_response(_running_texts(request.query.get("client")))
