"""`plan`: which layout FastUSP would choose, which are legal, what a file's weights take, and what travels where they
do not fit."""

import argparse
import re

import msgspec

from ..config import ModelSpec
from ..devices import Devices, gpu_states, local_devices
from ..engine.room import kept_free
from ..errors import RequestError
from ..models.cost import step_cost
from ..models.family import FamilyConfig
from ..models.placement import Placement, place_file
from ..planner import legal_layouts, plan
from ..weights.dtypes import main_dtype
from ..weights.tensor_info import FP8, TensorInfo
from .arguments import add_degrees, add_gpus
from .inputs import describe

LINKS = {"NVLink": 360, "PCIe 5": 50, "PCIe 4": 25}
"""GB/s that a GPU receives beside computing: measured on H100, and what a slot of 16 lanes gives."""
H100_TFLOPS = 989
SUSTAINED = 0.57
"""Share of a data sheet's rate that steps had on H100: FLUX.1 0.55, FLUX.2 0.61, Qwen-Image 0.57."""
UNPACKING = {"packed": 1.12, "fp8": 1.33}
"""A step with such weights, of one in 16 bits; measured."""
SHARING = 0.05
"""How much longer a step takes with blocks that all come from other GPUs in time; measured 0.04 and 0.06."""
SIZE, TEXT = (1024, 1024), 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model file, for its head count and weights; without: FLUX.1's 24")
    add_gpus(parser)
    add_degrees(parser)
    parser.add_argument(
        "--free", type=float, metavar="GB", help="as if each GPU had so much free memory; --gpus 0,1 need not exist"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help=f"a GPU's dense bf16 TFLOP/s by its data sheet, to predict a step (default: {H100_TFLOPS}, an H100)",
    )


class Step:
    """Predicts what a step takes, at SIZE pixels with TEXT tokens.

    tflops: a GPU's rate by its data sheet, dense, in bf16.
    """

    def __init__(self, header: dict[str, TensorInfo], config: FamilyConfig, ranks: int, tflops: float):
        cost = step_cost(config, ranks, size=SIZE, text=TEXT)
        packed = any(info.packing for info in header.values())
        stored = "packed" if packed else "fp8" if main_dtype(header) in FP8 else ""
        self._computing = cost.flops / ranks / (SUSTAINED * tflops * 1e12) * UNPACKING.get(stored, 1)
        self._sent, self.tflops = cost.sent_bytes, tflops

    def predict(self, found: Placement, *, peers: bool) -> str:
        """Says it, for the links that there may be."""
        if not (found.slabs or self._sent):
            return f"predicted {self._computing * 1000:.0f} ms a step"
        links = ["NVLink"] * peers + ["PCIe 5", "PCIe 4"]
        return "predicted " + ", ".join(f"{self.seconds(found, x) * 1000:.0f} ms a step over {x}" for x in links)

    def seconds(self, found: Placement, link: str) -> float:
        """link: by which tokens travel, and weights too, but from the host's memory over PCIe 5 beside NVLink. What
        travels and what computes hide each other, but where one link carries both tokens and weights to a GPU."""
        apart = link == "NVLink"
        weights_link = "PCIe 5" if apart and found.source == "host" else link
        journeys = found.streamed_bytes / (LINKS[weights_link] * 1e9)
        if apart or not self._sent:
            return max(self._computing * (1 + SHARING * len(found.slabs) / found.blocks), journeys)
        return self._computing + self._sent / (LINKS[link] * 1e9) + journeys


def run(arguments: argparse.Namespace) -> int:
    imagined, tflops = arguments.free is not None, arguments.tflops
    devices = _imagine(arguments.gpus) if imagined else local_devices(arguments.gpus)
    if tflops is not None and not (tflops > 0 and arguments.model and devices.gpus):
        needed = f"a model file, GPUs, and a rate above 0, as {H100_TFLOPS} of an H100"
        raise RequestError(f"--tflops {tflops:g} is for {needed}")
    heads, nbytes = 24, None
    if arguments.model:
        header, config, spec = describe(arguments.model, devices, bfloat16=True if imagined else None)
        heads = config.heads
        nbytes = place_file(header, _with(spec, "whole"), devices.ranks if devices.gpus else 1).device_bytes
    layout = plan(devices.ranks, heads, ulysses=arguments.ulysses, ring=arguments.ring)
    totals = {} if imagined else _totals(devices, nbytes)
    print(f"{devices}, {heads} heads: {layout}")
    print("legal: " + ", ".join(str(x) for x in legal_layouts(devices.ranks, heads)))
    if nbytes is None:
        return 0
    told = [] if imagined else memory(nbytes, devices, totals)
    free = int(arguments.free * 1e9) if imagined else min((x for x in totals.values() if x is not None), default=None)
    if free is not None:
        step = Step(header, config, devices.ranks, tflops or H100_TFLOPS)
        told += fits(header, config, spec, devices.ranks, free, step)
    print("\n".join(told))
    return 0


def _imagine(text: str) -> Devices:
    """GPUs that need not exist, as `0,1`. Raises RequestError."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise RequestError(f"--gpus {text}: with --free, list the GPUs' numbers, as 0,1")
    gpus = tuple(map(int, text.split(",")))
    return Devices(ranks=len(gpus), gpus=gpus)


def _totals(devices: Devices, nbytes: int | None) -> dict[int, int | None]:
    return {x.index: x.total for x in gpu_states() if x.index in devices.gpus} if nbytes and devices.gpus else {}


def _with(spec: ModelSpec, weights: str) -> ModelSpec:
    return msgspec.structs.replace(spec, weights=weights)


def fits(
    header: dict[str, TensorInfo], config: FamilyConfig, spec: ModelSpec, ranks: int, free: int, step: Step
) -> list[str]:
    """Says what `weights = auto` does where nobody else has any of so many bytes, with peer access and without."""
    kept = kept_free(config, ranks)
    told = [f"of {free / 1e9:.1f} GB of each GPU {kept / 1e9:.1f} GB are kept for all else"]
    ways = {"GPUs that reach each other's memory": True, "GPUs that do not": False} if ranks > 1 else {"one GPU": False}
    for name, peers in ways.items():
        try:
            found = place_file(header, _with(spec, "auto"), ranks, peers=peers, available=free - kept)
            told.append(f"{name}: {found}{_journeys(found)}; {step.predict(found, peers=peers)}")
        except RequestError as error:
            told.append(f"{name}: {error}")
    width, height = SIZE
    told.append(
        f"predictions: {width} x {height}, GPUs of {step.tflops:g} TFLOP/s (--tflops); right to about a fifth on H100 "
        "and H200, not measured on others"
    )
    return told


def _journeys(found: Placement) -> str:
    """What travels in a step."""
    if not found.slabs:
        return ""
    host = f", {found.host_bytes / 1e9:.1f} GB of host memory" if found.host_bytes else ""
    return f"{host}, {found.streamed_bytes / 1e9:.1f} GB come to each in a step"


def memory(nbytes: int, devices: Devices, totals: dict[int, int | None]) -> list[str]:
    """Says what the weights take.

    nbytes: bytes of the weights on the GPU that has most of them; for CPU ranks, of all weights.
    totals: bytes of GPUs' memory, by index; None where it is not told.
    """
    if not devices.gpus:
        return [f"weights: {nbytes / 1e9:.2f} GB, in pages of the file that the ranks share"]
    told = [f"weights: {nbytes / 1e9:.2f} GB on each GPU"]
    for i in devices.gpus:
        if totals[i] is None:
            told.append(f"NVML reports no memory size for GPU {i}: check yourself whether they fit")
    return told
