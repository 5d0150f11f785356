"""`bench` on a server, which may run on several machines: how it is named, and how fast what joins its ranks is."""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from ..config import Layout, ModelSpec, Settings
from ..devices import Devices, ServerDevices, local_devices
from ..errors import PoolError, RequestError
from ..keyfile import usual_path
from ..models.family import FamilyConfig
from ..planner import plan
from ..pool import Pool, Progress, Session, ask
from ..prompt import Prompt
from ..servers import address_of
from .inputs import random_inputs
from .limit import limit

MEASURED_BY = Settings(wire="auto", compile=False, cuda_graphs=False)
"""`wire = auto` measures the link before the first step, which nobody waits for to be compiled."""
SIZE, TEXT = (256, 256), 64
"""Pixels and tokens of that step."""


def add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        default="auto",
        help="as USP Loader's input: auto, all, 0,1, cpu:N, or the host:port of a server (default auto)",
    )
    parser.add_argument(
        "--key", type=Path, default=usual_path(), metavar="FILE", help="a server's key file (default %(default)s)"
    )


def devices_of(gpus: str, key: Path) -> Devices:
    """Raises DeviceError, KeyFileError or ProtocolError."""
    address = address_of(gpus)
    return local_devices(gpus, "a server's 'host:port'") if address is None else ask(address, str(key))


def links(devices: ServerDevices, spec: ModelSpec, config: FamilyConfig, seconds: float) -> Iterator[str]:
    """Says how ranks of a machine, and of several, send to each other, and how fast where GPUs do. The workers load
    `spec` for it. Nothing where one rank is alone. seconds: for each of the two, loading included."""
    here, machines = devices.together, devices.ranks // devices.together
    inside = plan(here, config.heads)
    found = {}
    if here > 1:
        found["inside a machine"] = Layout(batch=machines, ulysses=inside.ulysses, ring=inside.ring)
    if machines > 1:
        found["between machines"] = plan(devices.ranks, config.heads, per_machine=here)
    x, prompt = random_inputs(config, SIZE, TEXT)
    with closing(Pool(devices)) as pool:
        for where, layout in found.items():
            images, texts = x.repeat(layout.batch, 1, 1, 1), repeated(prompt, layout.batch)
            try:
                with limit(pool, seconds) as late:
                    Session(pool, spec, (layout,), MEASURED_BY).sample(
                        images,
                        torch.tensor([1.0, 0.0]),
                        sampler="euler",
                        positive=texts,
                        progress=Progress(interrupted=late),
                    )
            except (RequestError, PoolError) as error:
                yield f"{where}, {layout}: not measured: {str(error).splitlines()[0]}"
            else:
                yield f"{where}, {layout}: {pool.held.transport}"
    if machines > 1:
        yield (
            f"For what one machine alone would take: plan FILE --nnodes {machines} --network GBIT, which is 8 x the "
            f"GB/s between machines, and where each of its GPUs has a network card of its own as many times that"
        )


def repeated(prompt: Prompt, times: int) -> Prompt:
    """Returns the prompt of so many images, alike."""
    tensors = {name: x.repeat(times, *[1] * (x.dim() - 1)) for name, x in prompt.tensors().items()}
    return Prompt.from_tensors(tensors, None)
