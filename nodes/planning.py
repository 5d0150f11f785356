"""What USP Loader's values would come to, asked by the page while somebody edits them: POST /fastusp/plan."""

import asyncio
import functools
from typing import Literal

import msgspec
from aiohttp import web

from ..fastusp_backend.cli.file import File
from ..fastusp_backend.config import FileState, Layout, Settings
from ..fastusp_backend.devices import Devices, ServerDevices, gpu_states, list_gpus
from ..fastusp_backend.errors import FastUSPError, RequestError
from ..fastusp_backend.models.files import ModelFile
from ..fastusp_backend.models.placement import Placement, size_in_words
from ..fastusp_backend.models.prediction import CARDS, SIZE, Link, Prediction, in_milliseconds, slowest_card
from ..fastusp_backend.planner import plan_batches
from ..fastusp_backend.servers import Server
from .answers import FOREIGN, foreign, refused
from .comfyui import PromptServer
from .fewer_gpus import known_links
from .loader import STORAGE, read_named, spec_on, state_of
from .machines import may_be_slower
from .pools import all_pools
from .servers import devices_of, server_of


class Values(msgspec.Struct, frozen=True):
    """The inputs of USP Loader, and those of its USP Optimization Settings; None for one that another node computes."""

    unet_name: str | None = ""
    weight_dtype: Literal[tuple(STORAGE)] | None = "default"
    gpus: str | None = "auto"
    ulysses: int | None = 0
    ring: int | None = 0
    batch_parallel: str | None = "auto"
    settings: Settings = Settings()


def values_of(body: bytes) -> Values:
    """What the page sends, as JSON. Raises RequestError for anything else."""
    try:
        return msgspec.json.decode(body, type=Values)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"Send USP Loader's inputs by their names: {error}") from error


def preview(values: Values) -> dict:
    """gpus: nvidia-smi's indices of those that would be used; lines: the time of a step, the layouts, the weights; or
    problem: why it cannot be. Either may be missing where an input is not known yet."""
    found: dict = {"gpus": [], "lines": []}
    try:
        if values.gpus is None:
            return found | {"lines": ["gpus comes from another node: known when it runs"]}
        if (server := _stranger(values.gpus)) is not None:
            return found | {"lines": [f"{server.address} is asked when it runs: it is not in fastusp.toml"]}
        devices = devices_of(values.gpus)
        found["gpus"] = list(devices.gpus)
        if values.unet_name is None:
            return found | {"lines": [f"{devices}; unet_name comes from another node: known when it runs"]}
        file = _read(values.unet_name, state_of(values.unet_name))
        layouts = plan_batches(
            devices.ranks,
            file.config.heads,
            ulysses=values.ulysses or 0,
            ring=values.ring or 0,
            batch_parallel=values.batch_parallel or "auto",
            per_machine=devices.together,
        )
        step, weights = _costs(values, devices, file, layouts)
        found["lines"] = [step, _layouts(devices, layouts), weights]
    except FastUSPError as error:
        found["problem"] = str(error)
    return found


def _stranger(gpus: str) -> Server | None:
    """The server that `gpus` names, where neither fastusp.toml nor a run has had to do with it: a workflow that is only
    opened makes nobody connect to whom its author has chosen."""
    server = server_of(gpus)
    if server is None or server.listed or any(str(pool.devices) == server.address for pool in all_pools()):
        return None
    return server


@functools.lru_cache(maxsize=4)
def _read(unet_name: str, _state: FileState) -> ModelFile:
    """Reads a file's header once as long as the file stays as it is. The file is not kept open: what is deleted would
    keep its room on the disk."""
    file = read_named(unet_name)
    file.source.close()
    return file


def _layouts(devices: Devices, layouts: tuple[Layout, ...]) -> str:
    one = layouts[-1]
    guided = next(layout for layout in layouts if 2 % layout.batch == 0)
    several = f"; for 2 prompts or images {guided}" if guided != one else ""
    return f"{devices}: {one}{several}"


def _costs(values: Values, devices: Devices, file: ModelFile, layouts: tuple[Layout, ...]) -> tuple[str, str]:
    """What a step takes, and the weights. Raises RequestError where there is no room for them."""
    settings = values.settings
    spec = spec_on(devices, file, values.weight_dtype or "default")
    described = File(file.header, file.config, msgspec.structs.replace(spec, weights=settings.weights))
    if not devices.gpus:
        whole = size_in_words(described.whole(1, settings.linear).device_bytes)
        if isinstance(devices, ServerDevices):
            unknown = "no times known for a server's devices: `bench` measures them there"
            return may_be_slower(devices, layouts) or unknown, f"weights: {whole} in all"
        return "no times known for CPU ranks: measure them", f"weights: {whole}, which the ranks share"
    used = [gpu for gpu in list_gpus() if gpu.index in devices.gpus]
    card = slowest_card(gpu.name for gpu in used)
    known = known_links(devices.gpus, CARDS[card]) if card is not None else None
    links, memory = known if known is not None else (None, _least_memory(devices))
    unknown = f"no times known for {', '.join(sorted({gpu.name for gpu in used}))}: measure them"
    if memory is None:
        whole = size_in_words(described.whole(devices.ranks, settings.linear).device_bytes)
        return unknown, f"weights: {whole} on each GPU, if they stay whole; NVML tells no size of its memory"
    link = links[devices.ranks] if links else None
    # Over PCIe GPUs may reach each other or not; who wants weights to be shared knows that they do.
    peers = settings.weights == "shared" or card is not None and link is CARDS[card].nvlink
    found, kept = described.settle(devices.ranks, settings.linear, memory, peers=peers and devices.ranks > 1)
    room = "" if found.device_bytes <= memory - kept else "; little room for images above 1024 x 1024"
    weights = f"weights: {found}, of {memory / 1e9:.1f} GB{room}"
    if link is None:
        return unknown, weights

    def seconds(found: Placement, layouts: tuple[Layout, ...], link: Link) -> list[float]:
        made = Prediction(file.header, file.config, layouts, CARDS[card], settings.linear, settings.wire)
        return [made.seconds(found, link, prompts=prompts) for prompts in ((1,) if file.config.guidance else (1, 2))]

    steps, alone = seconds(found, layouts, link), None
    if devices.ranks > 1:
        try:
            whole, _ = described.settle(1, settings.linear, memory, peers=False)
            alone = seconds(whole, plan_batches(1, file.config.heads), links[1])
        except RequestError:
            weights += "; one GPU has no room for them"
    ms = [f"{in_milliseconds(step)} ms a step" for step in steps]
    if alone is not None:
        ms = [f"{text} ({one / step:.2f} x one GPU)" for text, step, one in zip(ms, steps, alone, strict=True)]
    return f"{', cfg above 1: '.join(ms)}, predicted for {card} at {SIZE[0]} x {SIZE[1]}", weights


def _least_memory(devices: Devices) -> int | None:
    """Bytes of the smallest GPU, whoever uses them now; None where NVML does not tell, and of GPUs in parts."""
    states = [state for state in gpu_states() if state.index in devices.gpus]
    if any(state.total is None or state.mig for state in states):
        return None
    return min((state.total for state in states), default=None)


def add_routes() -> None:
    @PromptServer.instance.routes.post("/fastusp/plan")
    async def plan(request: web.Request) -> web.Response:
        if foreign(request):
            return refused(403, FOREIGN)
        if request.content_type != "application/json":
            return refused(415, "Send JSON")
        try:
            values = values_of(await request.read())
        except RequestError as error:
            return refused(400, str(error))
        # In a thread, as the node's own validation: files and drivers may take their time.
        return web.json_response(await asyncio.to_thread(preview, values))
