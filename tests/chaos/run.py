"""The loop: a fault, a look at what came of it, the next prompt, a look at what was left."""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .checks import Traces, first_line, judge, judge_latents
from .faults import KINDS, Fault
from .report import Record
from .requests import FINITE, PATCHES, Request
from .scene import Ending, Scene
from .world import World

FEW = 60
"""Faults, for which not all answers are computed first."""
PROMPT_SECONDS = 60.0
"""How long a prompt may take that starts new workers, on CPU ranks and a busy machine."""


class Run:
    """Faults of `kinds`, of which the seed decides everything but how long things take. numbers: of those to come."""

    def __init__(self, world: World, seed: int, kinds: tuple[str, ...], numbers: Sequence[int]):
        self._world, self._seed, self._kinds = world, seed, kinds
        self._scene = Scene(world)
        world.learn(self._all() if len(numbers) > FEW else {r for n in numbers for r in self._asked(n)})
        self._traces = Traces(world)

    def _all(self) -> list[Request]:
        return [Request(*each) for each in itertools.product(FINITE, self._world.models, PATCHES)]

    def _asked(self, number: int) -> Iterator[Request]:
        """The requests whose answers a fault is judged by."""
        fault, following = self._draw(number)
        yield from (following, Request("short", fault.request.model))
        if not fault.request.endless:
            yield from (replace(fault.request, model=model) for model in {fault.request.model, fault.other})

    def kind(self, number: int) -> str:
        """Of fault `number`, from 1: each kind comes equally often."""
        block, place = divmod(number - 1, len(self._kinds))
        order = list(self._kinds)
        random.Random(f"{self._seed}/{block}").shuffle(order)
        return order[place]

    def play(self, number: int) -> Record:
        """Fault `number`; what is decided does not depend on those before it."""
        world = self._world
        fault, following = self._draw(number)
        record = Record(number, self.kind(number))
        try:
            fault.prepare()
            starts = world.pool.starts
            ending = self._play(fault)
        finally:
            fault.lift()
        if ending.how == "no effect" and "died" in fault.allowed and world.pool.starts > starts:
            ending.how = "replaced"  # between two evaluations: the next one went to new workers
        record.tell(fault, ending)
        record.findings += judge(world, fault, ending)
        if fault.keeps and fault.moment.kind != "start" and world.pool.starts != starts:
            record.findings.append("the workers were replaced")
        if ending.how == "result" and fault.allowed:
            self._absorb(fault, record)
        self._next(following, record)
        record.leftovers = self._traces.look()
        record.findings += record.leftovers
        return record

    def _draw(self, number: int) -> tuple[Fault, Request]:
        """The fault, and the prompt after it."""
        kind = self.kind(number)
        rng = random.Random(f"{self._seed}/{kind}/{number}")
        fault = KINDS[kind](self._world, rng)
        return fault, Request(rng.choice(FINITE), rng.choice(self._world.models), rng.choice(PATCHES))

    def _play(self, fault: Fault) -> Ending:
        if hasattr(fault, "play"):
            return fault.play()
        seconds = (PROMPT_SECONDS + fault.limit) * self._world.slowness
        return self._scene.play(fault.request, seconds, fault, fault.moment)

    def _absorb(self, fault: Fault, record: Record) -> None:
        """The fault may have come too late for its request: then this one meets it."""
        ending = self._scene.play(Request("short", fault.request.model), PROMPT_SECONDS * self._world.slowness)
        if ending.how == "result":
            return
        record.text += f"; then {first_line(ending.error)} after {ending.seconds:.1f} s"
        if ending.how not in fault.allowed or ending.hung:
            record.findings.append(f"a prompt later it was {ending.how}: {ending.error}")

    def _next(self, request: Request, record: Record) -> None:
        """It must be right, whatever was before it."""
        world = self._world
        began = time.monotonic()
        ending = self._scene.play(request, PROMPT_SECONDS * world.slowness)
        record.next = f"{request}: {ending.how}"
        if ending.how == "result":
            record.latents = world.compare(request, ending.latents)
            record.next = f"{request}: {record.latents}"
            record.findings += judge_latents(world, request, ending, record.latents)
            status = world.pool.status()
            if status["state"] != "idle" or "error" in status:
                record.findings.append(f"after the next prompt the status says {status}")
        else:
            record.findings.append(f"the next prompt, {request}, was {ending.how}: {ending.error}")
        if ending.hung:
            record.findings.append("HANG: the next prompt had to be ended by the clock")
        record.next_seconds = time.monotonic() - began
