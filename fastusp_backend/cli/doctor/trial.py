"""The pool at work: a tiny random model on one rank and, under each kind of layout, on all, with a time limit."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...config import Layout, ModelSpec, Settings
from ...devices import Devices
from ...errors import FastUSPError
from ...models.synthetic import TINY_FLUX, write_checkpoint
from ...planner import legal_layouts
from ...pool import Pool, Progress, Session
from ...prompt import Prompt
from ..inputs import BOUNDS, describe, difference, random_inputs
from ..limit import limit
from .check import Check

SIZE, TEXT, STEPS = (256, 256), 32, 4
"""Enough steps for GPUs to compile, to capture and to replay."""
NO_P2P = "NCCL_P2P_DISABLE"

_UNREACHED = (
    f"GPUs may not reach each other: run doctor with {NO_P2P}=1; if that works, ACS or an IOMMU is\n"
    "between them: turn it off (BIOS, intel_iommu=off or amd_iommu=off), or keep the variable set for ComfyUI.\n"
    "If it still hangs, NCCL_SHM_DISABLE=1 and NCCL_DEBUG=INFO tell more"
)
_LATE = r"within [\d.]+ s|made no progress|was not ready"
_KNOWN = (
    (r"C compiler|Python\.h", "Triton needs a C compiler and Python's headers: apt install gcc python3-dev"),
    (r"No space left on device|SIGBUS|/dev/shm", "In a container: docker run --shm-size=1g, or --ipc=host"),
    (
        r"pidfd|ptrace",
        "The container keeps processes from opening each other's memory: docker run --cap-add=SYS_PTRACE, or\n"
        f"set {NO_P2P}=1",
    ),
    (r"out of memory", "Other programs use the memory: nvidia-smi lists them"),
    (r"SIGKILL", "The system probably ran out of memory: free some, or use fewer ranks"),
    (r"no kernel image|driver version is insufficient|PTX", "torch and the driver do not fit this GPU: update both"),
    (r"busy or unavailable", "A GPU is in use and in exclusive compute mode: nvidia-smi -c DEFAULT"),
    (r"Unable to find address|Gloo connect|no socket interface", "Bring the loopback interface up: ip link set lo up"),
)
_NCCL = r"NCCL (WARN|error)|ncclSystemError|unhandled (cuda|system) error|illegal memory access|invalid device"


def advise(problem: str, gpus: int) -> str:
    """Says what to do about the error of a pool, log lines included: the remedy of the first known kind that it shows.

    gpus: how many the pool has, 0 for CPU ranks.
    """
    for pattern, advice in _KNOWN:
        if re.search(pattern, problem):
            return advice
    if gpus > 1 and re.search(f"{_LATE}|{_NCCL}", problem):
        return _UNREACHED
    if re.search(_LATE, problem):
        return "On a slow machine allow it more --seconds; else the log lines, if there are any, say where it hangs"
    return "Report it with the output of doctor --json"


@dataclass(frozen=True, slots=True)
class Job:
    """What every trial samples."""

    spec: ModelSpec
    given: tuple[torch.Tensor, Prompt]
    seconds: float
    """The limit of each request, its start included."""
    say: Callable[[str], None]

    def run(self, pool: Pool, layout: Layout) -> tuple[torch.Tensor, float | None]:
        """Returns latents, and the seconds until the workers were ready, None where they were before.

        Raises FastUSPError.
        """
        x, prompt = self.given
        began, starting = time.monotonic(), pool.status()["state"] == "off"
        ready: list[float] = []

        def phase(text: str) -> None:
            self.say(f"{layout}: {text}")
            if not text.startswith("starting"):
                ready.append(time.monotonic() - began)

        session = Session(pool, self.spec, (layout,), Settings())
        sigmas = torch.linspace(1, 0, STEPS + 1)
        with limit(pool, self.seconds) as interrupted:
            progress = Progress(phase=phase, interrupted=interrupted)
            latents = session.sample(x, sigmas, sampler="euler", positive=prompt, progress=progress)
            if pool.devices.gpus and layout.ranks > 1:  # measures the link; pool.held then tells the figure
                session = replace(session, settings=Settings(wire="auto"))
                session.evaluate(x, torch.tensor([0.6]), prompt, progress)
        return latents, ready[0] if starting and ready else None


def trials(devices: Devices, seconds: float, say: Callable[[str], None]) -> Iterator[Check]:
    """Tries one rank alone, then all of them; yields a check each, as soon as it is known."""
    heads = devices.ranks * -(-TINY_FLUX.heads // devices.ranks)  # every degree is legal
    hidden = heads * TINY_FLUX.hidden // TINY_FLUX.heads
    config = replace(TINY_FLUX, heads=heads, hidden=hidden, mlp=hidden, double_blocks=1, single_blocks=1)
    with tempfile.TemporaryDirectory(prefix="fastusp-doctor-") as folder:
        path = str(Path(folder) / "tiny.safetensors")
        write_checkpoint(path, config, dtype=torch.bfloat16)
        _, found, spec = describe(path, devices)
        job = Job(spec, random_inputs(found, SIZE, TEXT), seconds, say)
        with closing(Pool(devices.first(1))) as pool:
            check, expected = _attempt(job, pool, Layout(ulysses=1, ring=1), None)
        yield check
        if expected is not None and devices.ranks > 1:
            yield from _together(job, devices, kinds(devices.ranks, heads), expected)


def kinds(ranks: int, heads: int) -> list[Layout]:
    """Picks a layout of each kind that there is: Ulysses alone, both, ring alone."""
    legal = legal_layouts(ranks, heads)
    return list(dict.fromkeys([legal[0], legal[len(legal) // 2], legal[-1]]))


def _together(job: Job, devices: Devices, layouts: list[Layout], expected: torch.Tensor) -> Iterator[Check]:
    failed = None
    with closing(Pool(devices)) as pool:
        for layout in layouts:
            check, _ = _attempt(job, pool, layout, expected)
            yield check
            failed = failed or (layout if check.status == "fail" else None)
    if failed and devices.gpus and os.environ.get(NO_P2P, "0") == "0":
        with _variable(NO_P2P, "1"), closing(Pool(devices)) as pool:
            yield cure(_attempt(job, pool, failed, expected)[0])


def cure(check: Check) -> Check:
    """Tells what the same trial without direct access between GPUs says of the one that failed."""
    if check.status != "ok":
        return replace(check, name=f"{check.name}, with {NO_P2P}=1")
    advice = (
        "ACS or an IOMMU is between the GPUs: turn it off (BIOS, intel_iommu=off or amd_iommu=off), or set\n"
        f"{NO_P2P}=1 in ComfyUI's environment: exchanges then go through host memory"
    )
    return Check(f"{check.name}, with {NO_P2P}=1", "warn", f"works: {check.text}", advice)


def _attempt(job: Job, pool: Pool, layout: Layout, expected: torch.Tensor | None) -> tuple[Check, torch.Tensor | None]:
    """Returns a trial's check and its latents. expected: what one rank gave."""
    name = f"trial, {layout}" if layout.ranks > 1 else "trial, one rank"
    try:
        latents, started = job.run(pool, layout)
    except FastUSPError as error:
        return Check(name, "fail", str(error), advise(str(error), len(pool.devices.gpus))), None
    return judge(name, latents, expected, started, pool.held.transport, BOUNDS[job.spec.compute]), latents


def judge(
    name: str,
    latents: torch.Tensor,
    expected: torch.Tensor | None,
    started: float | None,
    transport: str,
    bound: float,
) -> Check:
    """Judges latents by the expected ones.

    transport: as in `protocol.Held`.
    bound: by how much the latents may differ, relative (Frobenius).
    """
    parts = [f"started in {started:.1f} s"] if started is not None else []
    parts += [transport] if transport not in ("", "none") else []
    wrong = not bool(latents.isfinite().all())
    if wrong:
        parts.append("the result is not finite")
    elif expected is not None:
        apart = difference(latents, expected)
        wrong = not apart <= bound
        parts.append(f"differs from one rank by {apart:.1e}" + f", above {bound:.0e}" * wrong)
    if not wrong:
        return Check(name, "ok", "; ".join(parts) or "sampled")
    advice = f"What ranks send each other arrives wrong. {_UNREACHED}" if expected is not None else advise("", 0)
    return Check(name, "fail", "; ".join(parts), advice)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets a variable for workers that start meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
