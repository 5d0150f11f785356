"""What people see of the pools: a line of text on the running node and in ComfyUI's log, and a route for the side
panel."""

import logging
from contextvars import ContextVar

from aiohttp import web

from .comfyui import PromptServer, get_executing_context
from .pools import all_pools

log = logging.getLogger(__name__)

_logged = ""
"""The last line. A phase is not logged twice: a sampler that steps from ComfyUI reports at each step."""


class NodeStatus:
    """The status line of the executing node: a headline that stays, and phases that cover it while they last."""

    def __init__(self, headline: str):
        self._headline = headline
        self._covered = False
        _tell(headline, again=True)

    def phase(self, text: str) -> None:
        self._covered = True
        _tell(f"FastUSP: {text}")

    def restore(self) -> None:
        """Shows the headline again, if a phase covers it."""
        if self._covered:
            self._covered = False
            _show(self._headline)


_current: ContextVar[NodeStatus | None] = ContextVar("fastusp_node_status", default=None)


def set_headline(text: str) -> None:
    """Starts a new status line for what the executing node does now."""
    _current.set(NodeStatus(f"FastUSP: {text}"))


def node_status() -> NodeStatus:
    """The current status line; one is begun where a model is called outside of any sampler."""
    if _current.get() is None:
        set_headline("evaluating in the workers")
    return _current.get()


def _tell(text: str, *, again: bool = False) -> None:
    """On the node, and in the log where it is news, or again."""
    global _logged
    _show(text)
    if again or text != _logged:
        _logged = text
        log.info("%s", text)


def _show(text: str) -> None:
    """Where no node is executing (a script), there is nobody to show it to."""
    context = get_executing_context()
    if context is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


def add_routes() -> None:
    """GET /fastusp/status: the pools, as `Pool.status` gives them. Takes no arguments and changes nothing."""

    @PromptServer.instance.routes.get("/fastusp/status")
    async def status(_request: web.Request) -> web.Response:
        return web.json_response({"pools": [pool.status() for pool in all_pools()]})
