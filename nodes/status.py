"""What people see of the pools: a line of text on the running node, and a route for the side panel."""

from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

from .pools import all_pools


def show_on_node(text: str) -> None:
    """Writes a status line on the node that is executing; where none is (a script), there is nobody to show it to."""
    context = get_executing_context()
    if context is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


def add_routes() -> None:
    """GET /fastusp/status: the pools, as `Pool.status` gives them. Takes no arguments and changes nothing."""

    @PromptServer.instance.routes.get("/fastusp/status")
    async def status(_request: web.Request) -> web.Response:
        return web.json_response({"pools": [pool.status() for pool in all_pools()]})
