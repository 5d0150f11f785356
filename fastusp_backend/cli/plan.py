"""`plan`: which layout FastUSP would choose, which are legal, and the memory that a file's weights take."""

import argparse

from ..devices import Devices, gpu_states, local_devices
from ..models.placement import place_file
from ..planner import legal_layouts, plan
from .arguments import add_degrees, add_gpus
from .inputs import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model file, for its head count and weights; without: FLUX.1's 24")
    add_gpus(parser)
    add_degrees(parser)


def run(arguments: argparse.Namespace) -> int:
    devices = local_devices(arguments.gpus)
    heads, nbytes = 24, None
    if arguments.model:
        header, config, spec = describe(arguments.model, devices)
        heads, nbytes = config.heads, place_file(header, spec, devices.ranks if devices.gpus else 1).device_bytes
    layout = plan(devices.ranks, heads, ulysses=arguments.ulysses, ring=arguments.ring)
    totals = {state.index: state.total for state in gpu_states()} if nbytes and devices.gpus else {}
    print(f"{devices}, {heads} heads: {layout}")
    print("legal: " + ", ".join(str(x) for x in legal_layouts(devices.ranks, heads)))
    if nbytes is not None:
        print("\n".join(memory(nbytes, devices, totals)))
    return 0


def memory(nbytes: int, devices: Devices, totals: dict[int, int | None]) -> list[str]:
    """Says what the weights take, and which GPUs are too small.

    nbytes: bytes of the weights on the GPU that has most of them; for CPU ranks, of all weights.
    totals: bytes of GPUs' memory, by index; None where it is not told.
    """
    if not devices.gpus:
        return [f"weights: {nbytes / 1e9:.2f} GB, in pages of the file that the ranks share"]
    told = [f"weights: {nbytes / 1e9:.2f} GB on each GPU"]
    for i in devices.gpus:
        if totals[i] is None:
            told.append(f"NVML reports no memory size for GPU {i}: check yourself whether they fit")
        elif totals[i] <= nbytes:
            has = f"GPU {i} has {totals[i] / 1e9:.2f} GB"
            told.append(f"warning: {has}. Use a smaller weight_dtype or file, or other GPUs")
    return told
