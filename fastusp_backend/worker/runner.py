"""The work of a rank: take the next request, prepare it, run it, with all other ranks, for ever.

A request has two parts. While it is prepared nothing is exchanged between the models, so an error on any rank is
gathered and refused, and the pool goes on: what it needs of memory is tried out there. Once it runs, an error on one
rank would leave the others waiting inside an exchange: it is fatal to the pool, and the client starts a new one.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from ..engine import Denoiser, Engine, FirstBlockCache
from ..errors import Cancelled, CheckpointError, PatchesLost
from ..models.family import NO_RESIDUALS, Residuals
from ..prompt import Prompt, Tensors
from ..protocol import Done, Evaluate, Failed, Park, Patch, Phase, Release, Sample, Shutdown, Step, Unmap
from ..protocol.messages import Request
from ..pulse import beat, show_memory, turn_to
from ..sampling import SAMPLERS, Cache, GuidedModel, StepState
from .activity import EVALUATING, PATCHING, PREPARING, RECEIVING, WAITING, explain, out_of_memory_in
from .agreement import Agreement, Refused
from .control import Control
from .crew import Crew
from .prompt_cache import PromptCache
from .requests import RESIDUAL, SamplingInputs, check_layout, evaluation_inputs, sampling_inputs
from .residency import Residency

log = logging.getLogger(__name__)

Work = Sample | Evaluate | Patch | Release | Park | Unmap | Shutdown

IN_FLIGHT = 2
"""Evaluations that a GPU may have before it, the running one too: it never waits for its CPU, and a cancel is felt."""

IDLE_SECONDS = 30.0
"""From when a request was sent until rank 0 takes it, and from then until all ranks have it."""

MEMORY_SECONDS = 0.5
"""Between two times that a rank looks at its memory for evaluations: the driver takes its time to tell."""


class Runner:
    """control is given on rank 0 alone: the others follow."""

    def __init__(self, crew: Crew, engine: Engine, control: Control | None):
        self._crew = crew
        self._engine = engine
        self._control = control
        self._agreement = Agreement(crew, engine)
        self._residency = Residency(self._agreement, crew, engine, self._reply)
        self._prompts = PromptCache()
        self._work = msgspec.msgpack.Decoder(Work)
        self._looked = 0.0  # at this rank's memory
        self._launched: deque[torch.cuda.Event] = deque()
        self._handlers: dict[type, Callable[[Any, Tensors], None]] = {
            Sample: self._sample,
            Evaluate: self._evaluate,
            Patch: self._patch,
            Unmap: self._unmap,
            Release: self._release,
            Park: self._park,
        }

    def serve(self) -> None:
        """Returns after Shutdown."""
        while True:
            try:
                message, tensors = self._next()
                if isinstance(message, Shutdown):
                    return
                self._handle(message, tensors)
            except Exception as error:
                if out := out_of_memory_in(error):
                    raise MemoryError(explain(out, self._agreement.doing, self._engine.memory_report())) from error
                raise

    def _handle(self, message: Work, tensors: Tensors) -> None:
        started = time.perf_counter()
        try:
            self._handlers[type(message)](message, tensors)
        except Cancelled:
            self._reply(Failed(id=message.id, kind="cancelled", rank=0, text="cancelled"))
        except Refused as refused:
            self._residency.tell(message.id)
            self._reply(Failed(id=message.id, kind=refused.kind, rank=refused.rank, text=str(refused)))
        self._show_memory(often=isinstance(message, Evaluate))
        log.info("request %d (%s) took %.3f s", message.id, type(message).__name__, time.perf_counter() - started)

    def _show_memory(self, *, often: bool) -> None:
        now = time.monotonic()
        if not often or now - self._looked > MEMORY_SECONDS:
            self._looked = now
            if (memory := self._engine.memory()) is not None:
                show_memory(memory)

    def _next(self) -> tuple[Work, Tensors]:
        message = body = tensors = None
        turn_to(WAITING)
        on_gpu = self._engine.device.type == "cuda"
        if not on_gpu or torch.cuda.current_stream().query():
            beat(IDLE_SECONDS)  # else the GPU is at what was asked for last, and the time for that has not changed
        if self._control is not None:
            message, tensors = self._control.next_request()
            body = msgspec.msgpack.encode(message) if self._crew.size > 1 else None
        body = self._crew.broadcast(body)
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # what waits for it below has more patience
        self._agreement.doing = RECEIVING
        beat(IDLE_SECONDS)
        if message is None:
            message = self._work.decode(body)
        tensors = self._crew.broadcast_tensors(tensors)
        self._agreement.doing = EVALUATING
        return message, tensors

    def _here(self, tensors: Tensors) -> Tensors:
        """A request's tensors on this rank's device. A ControlNet's stay where they are: each rank takes its own
        tokens' part. What is kept must not."""
        device = self._engine.device
        return {name: t if name.startswith(RESIDUAL) else t.to(device, copy=True) for name, t in tensors.items()}

    def _reply(self, message, tensors: Tensors | None = None) -> None:
        if self._control is not None:
            self._control.send(message, tensors)

    def _sample(self, request: Sample, sent: Tensors) -> None:
        rule = request.cache

        def prepare() -> tuple[Denoiser, SamplingInputs, Cache | FirstBlockCache | None, bool]:
            inputs = sampling_inputs(request, self._here(sent))
            denoiser = self._engine.denoiser(request.layout, request.settings)
            denoiser.check(inputs.x, inputs.prompts)
            cache = None
            if rule is not None and rule.kind == "first_block":
                cache = denoiser.first_block_cache(rule, request.timestep_scale, self._crew.all_numbers)
            elif rule is not None:
                cache = Cache(rule, self._crew.agree, together=inputs.alike)
            more = {"evaluations": len(inputs.timesteps), "spare": self._engine.spare}
            more["caches"] = isinstance(cache, FirstBlockCache)
            known = denoiser.probe_memory(inputs.x, inputs.prompts, **more)
            return denoiser, inputs, cache, known

        denoiser, inputs, cache, known = self._prepare(request, prepare)
        self._tell_of_compiling(request, known)
        model = GuidedModel(
            velocities=self._velocities(request, denoiser, cache=cache if isinstance(cache, FirstBlockCache) else None),
            positive=inputs.positive,
            negative=inputs.negative,
            cfg=request.cfg,
            timestep_scale=request.timestep_scale,
            inpainting=inputs.inpainting,
            cache=cache if isinstance(cache, Cache) else None,
        )
        follow = self._follower(request, steps=len(inputs.sigmas) - 1)
        run = SAMPLERS[request.sampler].run
        with torch.inference_mode():
            denoiser.prepare(inputs.timesteps, inputs.prompts)  # an exchange, so no part of what is prepared
            output = run(model, inputs.x, inputs.sigmas, noise=iter(inputs.noise), callback=follow, **request.options)
        counts = {} if cache is None else {"evaluations": cache.evaluations, "skipped": cache.skipped}
        self._finish(request, output, **counts)

    def _tell_of_compiling(self, request: Request, known: bool) -> None:
        """Else the first step of a shape would count as what came before it, as loading. CPU ranks compile nothing."""
        if self._engine.device.type == "cuda" and not known:
            self._reply(Phase(id=request.id, text="compiling"))

    def _follower(self, request: Sample, *, steps: int) -> Callable[[StepState], None]:
        """What tells the client of each step."""
        last = time.perf_counter()

        def follow(state: StepState) -> None:
            def step() -> Step:  # made when the step is done, not when it is queued
                nonlocal last
                seconds, last = time.perf_counter() - last, time.perf_counter()
                sigma = float(state.sigma)
                return Step(id=request.id, index=state.index, total=steps, sigma=sigma, seconds=seconds)

            self._reply(step, {"x": state.x, "denoised": state.denoised})

        return follow

    def _evaluate(self, request: Evaluate, sent: Tensors) -> None:
        def prepare() -> tuple[Denoiser, Prompt, torch.Tensor, torch.Tensor, Residuals, bool]:
            tensors = self._here(sent)
            prompt = self._prompts.prompt(request, tensors)
            x, timestep, residuals = evaluation_inputs(request, tensors)
            denoiser = self._engine.denoiser(request.layout, request.settings)
            denoiser.check(x, [prompt], residuals)
            known = denoiser.probe_memory(x, [prompt], residuals, spare=self._engine.spare)
            return denoiser, prompt, x, timestep, residuals, known

        denoiser, prompt, x, timestep, residuals, known = self._prepare(request, prepare)
        self._tell_of_compiling(request, known)
        (output,) = self._velocities(request, denoiser, residuals)(x, timestep, [prompt])
        self._finish(request, output)

    def _finish(self, request: Request, output: torch.Tensor, **counts: int) -> None:
        """Answers, with what `Done` counts, but not with what may have been computed from a file that was written to
        meanwhile."""
        try:
            self._engine.check_file()
        except CheckpointError as error:
            self._reply(Failed(id=request.id, kind="refused", rank=0, text=str(error)))
        else:
            self._reply(Done(id=request.id, **counts), {"output": output})

    def _patch(self, request: Patch, tensors: Tensors) -> None:
        self._residency.bring(request, lambda: self._engine.describe(request.model))
        count = len(request.weights)
        self._reply(Phase(id=request.id, text=f"patching {count} weight{'s' * (count != 1)}"))
        change = {"base": request.base, "number": request.number}
        self._agreement.together_or_drop(lambda: self._engine.patch(request.weights, tensors, **change), PATCHING)
        self._residency.tell(request.id, patched=True)
        self._reply(Done(id=request.id))

    def _unmap(self, order: Unmap, _: Tensors) -> None:
        self._crew.unmap()
        self._end(order)

    def _release(self, order: Release, _: Tensors) -> None:
        self._crew.unmap()
        self._engine.release()
        self._prompts.clear()
        self._end(order)

    def _park(self, order: Park, _: Tensors) -> None:
        self._residency.park()
        self._end(order)

    def _end(self, order: Unmap | Release | Park) -> None:
        self._residency.tell(order.id)
        self._reply(Done(id=order.id))

    def _prepare(self, request: Request, build):
        """Loads the model and calls `build`; raises Refused on all ranks when any of them failed.

        They agree on the model first: its reading is shared, and connecting makes a mesh: all ranks must come for both.
        """
        self._residency.bring(request, lambda: self._check(request))
        self._agreement.connect(request)
        prepared = self._agreement.together_or_drop(build, PREPARING)
        self._residency.tell(request.id)
        self._show_memory(often=isinstance(request, Evaluate))
        return prepared

    def _check(self, request: Request) -> None:
        check_layout(request, self._crew.size, self._engine.describe(request.model).heads)
        patches = self._engine.patches if self._engine.is_resident(request.model) else 0
        if patches != request.patches:
            raise PatchesLost(f"the weights hold patch set {patches}, not {request.patches}")

    def _velocities(
        self,
        request: Request,
        denoiser: Denoiser,
        residuals: Residuals = NO_RESIDUALS,
        cache: FirstBlockCache | None = None,
    ):
        """The denoiser with the ranks' agreement before each evaluation; raises Cancelled on all of them alike."""

        def go_on() -> None:
            self._limit_run_ahead()
            stop = self._control is not None and self._control.cancelled(request.id)
            if self._crew.agree(stop):
                raise Cancelled(f"request {request.id}")

        def velocities(x: torch.Tensor, timestep: torch.Tensor, prompts: list[Prompt]) -> list[torch.Tensor]:
            return denoiser(x, timestep, prompts, go_on, residuals, cache)

        return velocities

    def _limit_run_ahead(self) -> None:
        if self._engine.device.type != "cuda":
            return
        launched = torch.cuda.Event()
        launched.record()
        self._launched.append(launched)
        if len(self._launched) >= IN_FLIGHT:
            self._launched.popleft().synchronize()
