"""What the pool tests share: small requests, a look at a pool's processes, and processes that are no pool's."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing
from support import SMALL, inputs, spec_of

from fastusp_backend.config import Layout, Settings
from fastusp_backend.pool import Pool, Progress, request
from fastusp_backend.pool.session import Session
from fastusp_backend.prompt import Prompt, Tensors
from fastusp_backend.protocol import Message

ROOT = Path(__file__).resolve().parents[2]
GIVEN = inputs(SMALL, text=7, size=(8, 6))
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance)
TENSORS = {"x": GIVEN.x, **{f"positive.{name}": t for name, t in PROMPT.tensors().items()}}
SHORT = torch.linspace(1, 0, 4)
LONG = torch.linspace(1, 0, 5001)
"""More steps than any test waits for: they take a minute. With each the workers get a timestep, 0.2 ms a rank."""


def session(pool: Pool, model, layout: Layout | None = None, **settings) -> Session:
    return Session(pool, spec_of(model), (layout or Layout(ulysses=pool.devices.ranks, ring=1),), Settings(**settings))


def evaluate(pool: Pool, model, layout: Layout | None = None, **settings) -> torch.Tensor:
    return session(pool, model, layout, **settings).evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress())


def sample(
    pool: Pool, model, sigmas=SHORT, progress: Progress | None = None, layout: Layout | None = None
) -> torch.Tensor:
    return session(pool, model, layout).sample(
        GIVEN.x, sigmas, sampler="euler", positive=PROMPT, progress=progress or Progress()
    )


def submit(pool: Pool, make: Callable[[int], Message], tensors: Tensors | None = None) -> Tensors:
    """The answer to make(id), a message of a test's own."""
    return pool.run(lambda workers: request.submit(workers, make(workers.next_id()), tensors or {}, Progress()))


def pids(pool: Pool) -> list[int]:
    return pool.status()["pids"]


def run_dir(pool: Pool) -> Path:
    return pool._workers.run_dir.path


def processes_of(directory: Path) -> set[int]:
    """All processes that were started for a run directory."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"FASTUSP_RUN_DIR={directory}".encode() in environment:
                found.add(int(entry.name))
    return found


def forked() -> multiprocessing.context.BaseContext:
    """Starts processes from one that has imported torch, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pools"])
    return context


def run_ranks(work: Callable, *arguments, ranks: int) -> None:
    """work(rank, *arguments) in so many processes. Raises what one of them does."""
    forked()
    torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="forkserver")


class Stopwatch:
    def __init__(self):
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
