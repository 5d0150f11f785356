"""What is asked of a pool: each request ends with latents that depend on it alone, but for the endless ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from support import SMALL, inputs, randn

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.pool import NO_PATCHES, Progress, Session, WeightPatches, name_of
from fastusp_backend.prompt import Prompt

FINITE = ("short", "loop", "guided", "stepping", "control", "orders", "parked")
ENDLESS = ("endless", "endless stepping")
KINDS = FINITE + ENDLESS
MODELS = ("a", "b", "c")
"""b is as large as a; c has less blocks, and no guidance."""
PATCHES = ("plain", "lora", "large lora")

_STEPS = torch.linspace(1, 0, 13)
_GIVEN = inputs(SMALL, text=7, size=(8, 6))
_PROMPT = Prompt(_GIVEN.context, _GIVEN.y, _GIVEN.guidance)
_OTHER = inputs(SMALL, text=21, size=(8, 6), seed=10)
_NEGATIVE = Prompt(_OTHER.context, _OTHER.y, _OTHER.guidance)
_LARGE = inputs(SMALL, text=33, size=(32, 24), seed=20)
_LARGE_PROMPT = Prompt(_LARGE.context, _LARGE.y, _LARGE.guidance)
_CONTROL = {"input": [randn(1, 16 * 12, SMALL.hidden, seed=30)]}
"""More than what travels inside a frame."""


def _lora(seed: int, rank: int) -> WeightPatches:
    weights, tensors = {}, {}
    for name, out, width in (("double_blocks.0.img_attn.qkv", 1536, 512), ("single_blocks.0.linear1", 2560, 512)):
        up, down = randn(out, rank, seed=seed) * 0.05, randn(rank, width, seed=seed + 1)
        roles = {"up": name_of(up), "down": name_of(down)}
        tensors |= {name_of(up): up, name_of(down): down}
        weights[f"{name}.weight"] = (WeightPatch(kind="lora", tensors=roles, strength=0.5, alpha=float(rank)),)
        seed += 2
    return WeightPatches(weights, tensors)


_SETS = {"plain": NO_PATCHES, "lora": _lora(40, 4), "large lora": _lora(50, 64)}


class Caller(NamedTuple):
    """How a request is followed. step: after each, with its number. phase, interrupted: as in `Progress`."""

    step: Callable[[int], None] = lambda n: None
    phase: Callable[[str], None] = lambda text: None
    interrupted: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Request:
    kind: str
    model: str
    patches: str = "plain"

    def __str__(self) -> str:
        return f"{self.kind}({self.model}, {self.patches})"

    @property
    def endless(self) -> bool:
        return self.kind in ENDLESS

    @property
    def steps(self) -> int:
        """How often the caller hears of a step, at least."""
        if self.kind in _LOOPS:
            return len(_LOOPS[self.kind]["sigmas"]) - 1
        return {"stepping": 12, "control": 6, "orders": 7, "parked": 6}.get(self.kind, 10_000)

    def run(self, world, caller: Caller) -> torch.Tensor:
        """The latents. Raises as `Session`'s methods and `Pool`'s orders."""
        layouts = _layouts(self.kind, world.devices.ranks)
        session = Session(world.pool, world.spec(self.model), layouts, Settings(), _SETS[self.patches])
        progress = Progress(
            step=lambda event, _: caller.step(event.index), phase=caller.phase, interrupted=caller.interrupted
        )
        if self.kind in _LOOPS:
            return session.sample(_GIVEN.x, positive=_PROMPT, progress=progress, **_LOOPS[self.kind])
        stepping = _Stepping(session, caller, progress)
        if self.kind == "stepping":
            return stepping.run(12)
        if self.kind == "control":
            return stepping.large(6)
        if self.kind == "orders":
            return self._orders(world, stepping)
        if self.kind == "parked":
            stepping.run(2)
            world.park(self.model)
            return stepping.run(4)
        while True:
            stepping.run(12)

    def _orders(self, world, stepping: "_Stepping") -> torch.Tensor:
        pool = world.pool
        for order in (lambda: world.park(self.model), world.release, pool.unmap, world.release):
            stepping.large(1)
            order()
        return stepping.run(3)


class _Stepping:
    """A sampler of the host's: one evaluation after another."""

    def __init__(self, session: Session, caller: Caller, progress: Progress):
        self._session, self._caller = session, caller
        self._progress = replace(progress, step=lambda event, tensors: None)
        self._count = 0

    def run(self, steps: int) -> torch.Tensor:
        x = _GIVEN.x
        with self._session.pool.sampling():
            for now, then in zip(_STEPS[:steps], _STEPS[1:], strict=False):
                x = x + (then - now) * self._evaluate(x, now, _PROMPT)
        return x

    def large(self, steps: int) -> torch.Tensor:
        x = _LARGE.x
        with self._session.pool.sampling():
            for now, then in zip(_STEPS[:steps], _STEPS[1:], strict=False):
                x = x + (then - now) * self._evaluate(x, now, _LARGE_PROMPT, _CONTROL)
        return x

    def _evaluate(self, x: torch.Tensor, sigma: torch.Tensor, prompt: Prompt, control=None) -> torch.Tensor:
        velocity = self._session.evaluate(x, sigma[None], prompt, self._progress, control)
        self._caller.step(self._count)
        self._count += 1
        return velocity


_LOOPS = {
    "short": {"sigmas": torch.linspace(1, 0, 4), "sampler": "euler"},
    "loop": {"sigmas": torch.linspace(1, 0, 41), "sampler": "dpmpp_2m"},
    "guided": {"sigmas": torch.linspace(1, 0, 9), "sampler": "heun", "negative": _NEGATIVE, "cfg": 3.0},
    "endless": {"sigmas": torch.linspace(1, 0, 20_001), "sampler": "euler"},
}


def _layouts(kind: str, ranks: int) -> tuple[Layout, ...]:
    ring, ulysses = Layout(ulysses=1, ring=ranks), Layout(ulysses=ranks, ring=1)
    if SMALL.heads % ranks:
        return (ring,)
    if kind == "guided" and ranks % 2 == 0:
        return Layout(batch=2, ulysses=ranks // 2, ring=1), ulysses
    return (ring,) if kind in ("stepping", "endless stepping", "orders") else (ulysses,)
