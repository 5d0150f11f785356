"""The processors beside a GPU: host memory on another NUMA node is slower to reach from it."""

import logging
import os
from pathlib import Path

import torch

log = logging.getLogger(__name__)

PCI = Path("/sys/bus/pci/devices")


def stay_near(device: torch.device, pci: Path = PCI) -> set[int]:
    """Has this thread, and those that it starts, run on the processors beside a GPU, of those that it may run on; torch
    uses no more threads than those are.

    pci: Linux' folder of PCI devices. Returns the processors; none where the GPU's address is not told (torch before
    2.8), where Linux tells no neighbours (in a container, on other systems), or where all of them are forbidden:
    then nothing changes.
    """
    of = torch.cuda.get_device_properties(device)
    if not hasattr(of, "pci_bus_id"):
        return set()
    address = f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"
    try:
        listed = (pci / address / "local_cpulist").read_text()
    except OSError:
        return set()
    near = processors(listed) & os.sched_getaffinity(0)
    if not near:
        return near
    try:
        os.sched_setaffinity(0, near)
    except OSError as error:  # what guards a container may forbid it
        log.info("ranks stay on all processors: %s", error)
        return set()
    torch.set_num_threads(min(torch.get_num_threads(), len(near)))
    return near


def processors(listed: str) -> set[int]:
    """Reads Linux' notation, as '0-3,8-11' or an empty line."""
    found: set[int] = set()
    for part in listed.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
