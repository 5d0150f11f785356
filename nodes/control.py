"""What people may do with a pool from the page: POST /fastusp/pools/ACTION with {"devices": ...}, of those that
GET /fastusp/status names, and read: GET /fastusp/pools/log?devices=...&from=N, and /fastusp/pools/report?devices=...
Nothing else is taken, and nothing from another site."""

import asyncio
import re
from collections.abc import Callable

from aiohttp import web

from ..fastusp_backend.errors import FastUSPError
from ..fastusp_backend.pool import Pool
from .answers import FOREIGN, foreign, refused
from .comfyui import PromptServer
from .pools import pool_named
from .report import report
from .status import push_pools

_NO_POOL = "There is no pool on {}"
_BUSY = "Stop the run first: the pool on {} works on a prompt"


def _release(pool: Pool) -> None:
    """Its memory is free then; the processes stay warm."""
    if pool.status()["state"] in ("busy", "stopping"):
        raise FastUSPError(_BUSY.format(pool.devices))
    pool.release()


def _stop(pool: Pool) -> None:
    """Also in the middle of a run, which fails then: for workers that answer nothing else."""
    pool.stop("they were stopped from the page")


def _restart(pool: Pool) -> None:
    _stop(pool)
    pool.start()


ACTIONS: dict[str, Callable[[Pool], None]] = {"release": _release, "stop": _stop, "restart": _restart}


def add_routes() -> None:
    routes = PromptServer.instance.routes

    @routes.post("/fastusp/pools/{action}")
    async def act(request: web.Request) -> web.Response:
        action = ACTIONS.get(request.match_info["action"])
        if action is None:
            return refused(404, f"Choose one of {', '.join(ACTIONS)}, not {request.match_info['action']}")
        if foreign(request):
            return refused(403, FOREIGN)
        if request.content_type != "application/json":
            return refused(415, "Send JSON")
        try:
            devices = (await request.json())["devices"]
        except (ValueError, KeyError, TypeError):
            return refused(400, 'Send {"devices": ...}, as GET /fastusp/status names them')
        pool = pool_named(devices)
        if pool is None:
            return refused(404, _NO_POOL.format(devices))
        try:
            await asyncio.get_running_loop().run_in_executor(None, action, pool)
        except FastUSPError as error:
            return refused(409, str(error))
        push_pools()
        return web.json_response(pool.status())

    @routes.get("/fastusp/pools/log")
    async def log(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        devices, number = request.query.get("devices"), request.query.get("from", "0")
        if not re.fullmatch("[0-9]{1,15}", number):
            return refused(400, f"Send from=N, the number of a line, not {number}")
        pool = pool_named(devices)
        if pool is None:
            return refused(404, _NO_POOL.format(devices))
        lines, following = await asyncio.to_thread(pool.log_since, int(number))
        return web.json_response({"lines": lines, "next": following})

    @routes.get("/fastusp/pools/report")
    async def told(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        devices = request.query.get("devices")
        pool = pool_named(devices)
        if pool is None:
            return refused(404, _NO_POOL.format(devices))
        return web.json_response({"report": await asyncio.to_thread(report, pool)})
