"""What changes by itself while people look at it: a page says once what it shows, and is sent that until it says
otherwise or is gone. Pages ask nothing again and again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from ..fastusp_backend.devices import gpu_loads
from ..fastusp_backend.errors import DeviceError
from .answers import FOREIGN, foreign, refused
from .comfyui import PromptServer
from .pools import all_pools, pool_named
from .status import push_changes

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at pools and at what their workers have written."""
LOADS_SECONDS = 4.0
"""Between two questions to NVML, each of which takes a process."""


class Log(msgspec.Struct):
    """A pool's log, of which a page has the lines before number `from_line`."""

    devices: str
    from_line: int = msgspec.field(default=0, name="from")


class Watch(msgspec.Struct, frozen=True):
    """What the page of a client of ComfyUI's websocket shows: the panel, and a pool's log."""

    client: str
    panel: bool = False
    log: Log | None = None


_watches: dict[str, Watch] = {}
_tasks: dict[Callable, asyncio.Task] = {}
_sending = asyncio.Lock()
"""A page's request and the next look may come at once; lines go out in order."""


def _connected(client: str) -> bool:
    return client in PromptServer.instance.sockets


async def _changes() -> None:
    push_changes()
    for watch in [*_watches.values()]:
        await _send_log(watch)


async def _send_log(watch: Watch) -> None:
    """Sends a page the lines that it has not: devices; asked: the number of the first one that it lacks; from: of the
    first that is sent, later where that is no longer kept; next: of the one to come; lines."""
    pool = pool_named(watch.log.devices) if watch.log is not None else None
    if pool is None:
        return
    async with _sending:
        asked = watch.log.from_line
        lines, watch.log.from_line = await asyncio.to_thread(pool.log_since, asked)
        following = watch.log.from_line
        if lines:
            told = {"devices": watch.log.devices, "asked": asked, "from": following - len(lines), "next": following}
            PromptServer.instance.send_sync("fastusp.log", told | {"lines": lines}, watch.client)


async def _loads() -> None:
    """Sends those who show the panel what the GPUs do, where a pool has some: gpus, as `nvml.loads`."""
    if not any(watch.panel for watch in _watches.values()) or not any(pool.devices.gpus for pool in all_pools()):
        return
    try:
        gpus = await asyncio.to_thread(gpu_loads)
    except DeviceError:  # the loader's chips say why
        gpus = []
    for watch in _watches.values():
        if watch.panel:
            PromptServer.instance.send_sync("fastusp.loads", {"gpus": gpus}, watch.client)


async def _repeat(tell: Callable[[], Awaitable[None]], seconds: float) -> None:
    logged = ""  # what goes on for each look is told once
    while True:
        for client in [client for client in _watches if not _connected(client)]:
            del _watches[client]
        if not _watches:
            return
        try:
            await tell()
        except Exception as error:  # of any kind: the next look may see more
            if repr(error) != logged:
                log.exception("FastUSP: the pages were not told what changed")
            logged = repr(error)
        await asyncio.sleep(seconds)


def add_routes() -> None:
    """POST /fastusp/watch: a `Watch`, in the place of that client's last one."""

    @PromptServer.instance.routes.post("/fastusp/watch")
    async def watch(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        if request.content_type != "application/json":
            return refused(415, "Send JSON")
        try:
            wanted = msgspec.json.decode(await request.read(), type=Watch)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return refused(400, f"Send the page's client, panel and log: {error}")
        if not _connected(wanted.client):
            return refused(404, "Connect to /ws first: ComfyUI has no such client")
        if not (wanted.panel or wanted.log):
            _watches.pop(wanted.client, None)
            return web.json_response({})
        _watches[wanted.client] = wanted
        for tell, seconds in ((_changes, LOOK_SECONDS), (_loads, LOADS_SECONDS)):
            if tell not in _tasks or _tasks[tell].done():
                _tasks[tell] = asyncio.create_task(_repeat(tell, seconds))
        await _send_log(wanted)
        return web.json_response({})
