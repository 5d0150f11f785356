"""Whether fewer GPUs than USP Loader was given are predicted to be faster: told while the workers start, from what NVML
tells of the GPUs and the file's header of the model."""

import functools
import itertools
import logging
import os

import msgspec

from ..fastusp_backend.devices import Devices, GpuState, gpu_links, gpu_states, list_gpus
from ..fastusp_backend.errors import DeviceError
from ..fastusp_backend.models.files import ModelFile
from ..fastusp_backend.models.placement import place_file
from ..fastusp_backend.models.prediction import (
    CARDS,
    Card,
    Link,
    Prediction,
    fewer_are_faster,
    in_milliseconds,
    link_of,
    slowest_card,
)
from ..fastusp_backend.planner import plan_batches
from ..fastusp_backend.pool import Session

log = logging.getLogger(__name__)

ROOM = 0.7
"""The share of a GPU's memory that all weights may take. Where they take more, blocks may have to travel on fewer GPUs,
and no more GPUs are advised against."""

NOTICED = 5e-3
"""Seconds a step. Less, as of a small model to try things with, is not told."""


def faster_with_fewer(session: Session, file: ModelFile) -> Devices | None:
    """Those of a session's GPUs, the first ones, on which a step is predicted to be faster, at cfg 1 and, for models
    without embedded guidance, above it; warns of it. None where there are none such, or cards or links are not known.
    """
    devices, spec = session.pool.devices, session.spec
    if len(devices.gpus) < 2 or spec.weights not in ("auto", "whole"):  # who sets others wants the room
        return None
    batches = "auto" if len(session.layouts) > 1 else "off"
    if session.layouts != plan_batches(devices.ranks, file.config.heads, batch_parallel=batches):
        return None  # degrees that somebody has set would not go with fewer GPUs, and may be what is slow
    card = slowest_card(gpu.name for gpu in list_gpus() if gpu.index in devices.gpus)
    found = known_links(devices.gpus, CARDS[card]) if card is not None else None
    if found is None:
        return None
    links, memory = found
    whole = place_file(file.header, msgspec.structs.replace(spec, weights="whole"), 1)
    if whole.device_bytes > ROOM * memory:
        return None
    kinds: list[dict[int, float]] = [{} for _ in ((1,) if file.config.guidance else (1, 2))]
    for count, link in links.items():
        layouts = session.layouts
        if count < devices.ranks:
            layouts = plan_batches(count, file.config.heads, batch_parallel=batches)
        made = Prediction(file.header, file.config, layouts, CARDS[card], spec.linear, session.settings.wire)
        for prompts, kind in enumerate(kinds, 1):
            kind[count] = made.seconds(whole, link, prompts=prompts)
    fewer = fewer_are_faster(kinds, devices.ranks)
    if fewer is None or kinds[0][devices.ranks] - kinds[0][fewer] < NOTICED:
        return None
    some, ms = devices.first(fewer), {count: in_milliseconds(seconds) for count, seconds in kinds[0].items()}
    wire = "; wire = auto in USP Optimization Settings sends less" if session.settings.wire == "exact" else ""
    _tell(
        f"Set gpus to {','.join(map(str, some.gpus))} in USP Loader: a step of {file.config.family} at 1024 x 1024 and "
        f"cfg 1 is predicted to take {ms[fewer]} ms there, and {ms[devices.ranks]} ms on {devices} over "
        f"{links[devices.ranks]}{wire}"
    )
    return some


@functools.cache
def _tell(text: str) -> None:
    """Warns once a process."""
    log.warning("FastUSP: %s. bench measures it: python -m fastusp_backend bench FILE", text)


def known_links(gpus: tuple[int, ...], card: Card) -> tuple[dict[int, Link], int] | None:
    """What joins the first 1, 2, ... of some GPUs, and the bytes of the smallest one's memory; None where NVML does not
    tell it."""
    told = _joined()
    if told is None:
        return None
    states, words = told
    state = {found.index: found for found in states}
    if any(gpu not in state or state[gpu].total is None or state[gpu].mig for gpu in gpus):
        return None  # of a GPU in parts, a name says little
    if os.environ.get("NCCL_P2P_DISABLE") == "1":  # tokens go through the host's memory, whatever joins the GPUs
        words = dict.fromkeys(words, "")
    links = {}
    for count in range(1, len(gpus) + 1):
        pairs = [f"{i}-{j}" for i, j in itertools.combinations(sorted(gpus[:count]), 2)]
        if any(pair not in words for pair in pairs):
            return None
        links[count] = link_of(card, [words[pair] for pair in pairs], [state[gpu].pcie for gpu in gpus[:count]])
    return links, min(state[gpu].total for gpu in gpus)


@functools.cache
def _joined() -> tuple[tuple[GpuState, ...], dict[str, str]] | None:
    """What NVML tells of the GPUs and the links between them, asked once a process; None where it fails."""
    try:
        return gpu_states(), gpu_links()
    except DeviceError:  # the pool works without
        return None
