"""A host that samples without end: `python -m tests.chaos.host GPUS FILE`. Says where its pool's run directory is, and
each step's number."""

import sys

import torch
from support import SMALL, inputs

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.devices import parse_devices
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt


def main(gpus: str, file: str) -> None:
    devices = parse_devices(gpus)
    pool = Pool(devices)
    print(pool.start().run_dir.path, flush=True)
    spec = ModelSpec.of_file(file, storage=None, compute="bfloat16" if devices.gpus else "float32")
    given = inputs(SMALL, text=7, size=(8, 6))
    Session(pool, spec, (Layout(ulysses=1, ring=devices.ranks),), Settings()).sample(
        given.x,
        torch.linspace(1, 0, 20_001),
        sampler="euler",
        positive=Prompt(given.context, given.y, given.guidance),
        progress=Progress(step=lambda event, tensors: print(event.index, flush=True)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
