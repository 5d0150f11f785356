"""A pool, the files of its models, and the latents that are right."""

import logging
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from support import SMALL, relative_difference

from fastusp_backend.config import ModelSpec
from fastusp_backend.devices import Devices
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Pool, hangs
from fastusp_backend.pool import pool as pools

from .disk import mount_small, unmount
from .requests import MODELS, Caller, Request

_CONFIGS = {"a": SMALL, "b": SMALL, "c": replace(SMALL, guidance=False, double_blocks=1, single_blocks=1)}

LOOP, LEAVE, FAIL = signal.SIGUSR2, signal.SIGRTMIN + 1, signal.SIGRTMIN + 2
"""Signals on which a rank loops in its main thread, leaves with an exit code, fails with an exception."""

_SITE = """
import os, signal

def loop(number, frame):
    while True:
        pass

def fail(number, frame):
    raise SystemExit(3)

signal.signal(signal.SIGUSR2, loop)
signal.signal(signal.SIGRTMIN + 1, lambda number, frame: os._exit(7))
signal.signal(signal.SIGRTMIN + 2, fail)
"""


class World:
    """files: model -> its file, which faults leave alone. slowness: how much longer than on CPUs things may take.
    no_disk: why the folder for temporary files cannot be filled; empty where it can."""

    def __init__(self, devices: Devices, models: tuple[str, ...] = MODELS):
        self.devices, self.models = devices, models
        gpu = devices.type == "cuda"
        self.slowness = 3.0 if gpu else 1.0
        self._compute, self._rounding = ("bfloat16", 0.02) if gpu else ("float32", 2e-5)
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.base = Path(tempfile.mkdtemp(dir="/tmp"))  # short, for the address of a socket
        self.no_disk = mount_small(self.base, 512 if gpu else 64)
        self._settle(gpu)
        self.files = {name: self.folder / f"{name}.safetensors" for name in models}
        for seed, (name, path) in enumerate(self.files.items()):
            write_checkpoint(str(path), _CONFIGS[name], seed=seed, dtype=getattr(torch, self._compute))
        self.expected: dict[Request, torch.Tensor] = {}
        self.pressing = False
        """Whether a Ctrl-C is a fault's."""
        self._given: dict[str, ModelSpec | Path] = {}
        self._moved: tuple[int, str] | None = None
        self.pool = Pool(devices)

    def _settle(self, gpu: bool) -> None:
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        tempfile.tempdir = str(self.base)
        here = Path(__file__).resolve().parents[2]
        os.environ |= {"TMPDIR": str(self.base), "PYTHONPATH": os.pathsep.join([str(site), str(here)])}
        # As for the pool tests, see their conftest.
        os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        logging.getLogger().addHandler(logging.NullHandler())  # what the pool warns of is part of what is tried
        hangs.START_SECONDS = 90.0 * self.slowness
        pools.KEPT_BYTES = 0  # so that `unmap` always has something to do

    def learn(self, requests: Iterable[Request]) -> None:
        """Has requests answered, before any fault; those of one model and patches after each other."""
        for request in sorted(requests, key=lambda r: (r.model, r.patches, r.kind)):
            if self._lies_elsewhere(request.model):
                self.release()
            self.expected[request] = request.run(self, Caller())
        assert sorted(self.ranks()) == [*range(self.devices.ranks)], "faults would strike no rank"

    def spec(self, model: str) -> ModelSpec:
        """What a request for `model` asks for: its file, or what a fault has given in its place."""
        if self._moved is not None and self._moved[1] != model:
            self._moved = None
        given = self._given.get(model, self.files[model])
        return given if isinstance(given, ModelSpec) else self.spec_of(given)

    def spec_of(self, path: Path) -> ModelSpec:
        return ModelSpec.of_file(str(path), storage=None, compute=self._compute)

    def give(self, model: str, given: ModelSpec | Path | None) -> None:
        """Has requests for `model` ask for this, or for a file as it is by then; None: for its own file again."""
        self._given.pop(model, None)
        if given is not None:
            self._given[model] = given

    def park(self, model: str) -> None:
        self._moved = self.pool.starts, model
        self.pool.park()

    def release(self) -> None:
        self._moved = None
        self.pool.release()

    def moved(self, request: Request) -> bool:
        """Whether weights came back from where they were parked: they lie elsewhere, and products over them may sum in
        another order."""
        return request.kind == "parked" or self._lies_elsewhere(request.model)

    def _lies_elsewhere(self, model: str) -> bool:
        return self._moved == (self.pool.starts, model)

    def compare(self, request: Request, latents: torch.Tensor) -> str:
        """`bits`, `rounding` or `wrong`."""
        expected = self.expected[request]
        if torch.equal(latents, expected):
            return "bits"
        if latents.shape == expected.shape and relative_difference(latents, expected) < self._rounding:
            return "rounding"
        return "wrong"

    @property
    def run_dir(self) -> Path | None:
        workers = self.pool._workers
        return workers.run_dir.path if workers is not None else None

    @property
    def torchrun(self) -> int | None:
        """Its process, while it lives."""
        workers = self.pool._workers
        if workers is None or workers.processes.torchrun is None or not workers.alive:
            return None
        return workers.processes.torchrun.pid

    def ranks(self) -> dict[int, int]:
        """rank -> its process, of those that there are now."""
        return dict(_children(self.torchrun)) if self.torchrun is not None else {}

    def end_workers(self) -> None:
        """So that the next prompt starts new ones."""
        if self.pool._workers is not None:
            self.pool._workers.kill()

    def new_pool(self) -> None:
        self.pool.close()
        self.pool = Pool(self.devices)

    def close(self) -> None:
        self.pool.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.no_disk:
            unmount(self.base)
        shutil.rmtree(self.base, ignore_errors=True)


def _children(pid: int) -> Iterator[tuple[int, int]]:
    """torchrun's ranks, each known by the file of its own that it writes to: a fork's environment is torchrun's."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue  # that thread has ended
        for child in children:
            try:
                written = Path(os.readlink(f"/proc/{child}/fd/1"))
            except OSError:
                continue
            if written.name == "stdout.log":
                yield int(written.parent.name), int(child)
