"""The work of a rank: take the next request, prepare it, run it, with all other ranks, for ever.

A request has two parts. While it is prepared nothing is exchanged between the models, so an error on any rank is
gathered and refused, and the pool goes on: what it needs of memory is tried out there. Once it runs, an error on one
rank would leave the others waiting inside an exchange: it is fatal to the pool, and the client starts a new one.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec
import torch

from ..engine import BatchedDenoiser, Engine
from ..errors import Cancelled, CheckpointError, LayoutError, PatchesLost, RequestError
from ..models.family import NO_RESIDUALS, Residuals
from ..prompt import Inpainting, Prompt, Tensors, take
from ..protocol import Done, Evaluate, Failed, Park, Patch, Phase, Release, Sample, Shutdown, Step, Unmap
from ..protocol.messages import Request
from ..pulse import beat, turn_to
from ..sampling import SAMPLERS, GuidedModel, StepState
from .agreement import Agreement, Refused
from .control import Control
from .crew import Crew
from .memory import EVALUATING, PATCHING, PREPARING, RECEIVING, WAITING, explain, out_of_memory_in
from .residency import Residency
from .tensors import CONTROL, KeptPrompts, residuals_of

log = logging.getLogger(__name__)

Work = Sample | Evaluate | Patch | Release | Park | Unmap | Shutdown

IN_FLIGHT = 2
"""Evaluations that a GPU may have before it, the running one too: it never waits for its CPU, and a cancel is felt."""

IDLE_SECONDS = 30.0
"""From when a request was sent until rank 0 takes it, and from then until all ranks have it."""


class Runner:
    """control is given on rank 0 alone: the others follow."""

    def __init__(self, crew: Crew, engine: Engine, control: Control | None):
        self._crew = crew
        self._engine = engine
        self._control = control
        self._agreement = Agreement(crew, engine)
        self._residency = Residency(self._agreement, crew, engine, self._reply)
        self._prompts = KeptPrompts()
        self._work = msgspec.msgpack.Decoder(Work)
        self._launched: deque[torch.cuda.Event] = deque()

    def serve(self) -> None:
        """Returns after Shutdown."""
        while True:
            try:
                message, tensors = self._next()
                if isinstance(message, Shutdown):
                    return
                if isinstance(message, Unmap | Release | Park):
                    self._obey(message)
                else:
                    self._serve(message, tensors)
            except Exception as error:
                if out := out_of_memory_in(error):
                    raise MemoryError(explain(out, self._agreement.doing, self._engine.held())) from error
                raise

    def _serve(self, message: Request | Patch, tensors: Tensors) -> None:
        started = time.perf_counter()
        try:
            if isinstance(message, Sample):
                self._sample(message, tensors)
            elif isinstance(message, Patch):
                self._patch(message, tensors)
            else:
                self._evaluate(message, tensors)
        except Cancelled:
            self._reply(Failed(id=message.id, kind="cancelled", rank=0, text="cancelled"))
        except Refused as refused:
            self._residency.tell(message.id)
            self._reply(Failed(id=message.id, kind=refused.kind, rank=refused.rank, text=str(refused)))
        log.info("request %d (%s) took %.3f s", message.id, type(message).__name__, time.perf_counter() - started)

    def _obey(self, order: Unmap | Release | Park) -> None:
        if isinstance(order, Park):
            self._residency.park()
        else:
            self._crew.unmap()
        if isinstance(order, Release):
            self._engine.release()
            self._prompts.clear()
        self._residency.tell(order.id)
        self._reply(Done(id=order.id))

    def _next(self) -> tuple[Work, Tensors]:
        message = body = tensors = None
        turn_to(WAITING)
        on_gpu = self._engine.device.type == "cuda"
        if not on_gpu or torch.cuda.current_stream().query():
            beat(IDLE_SECONDS)  # else the GPU is at what was asked for last, and the time for that has not changed
        if self._control is not None:
            message, tensors = self._control.next_request()
            body = msgspec.msgpack.encode(message) if self._crew.size > 1 else None
        body = self._crew.share(body)
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # what waits for it below has more patience
        self._agreement.doing = RECEIVING
        beat(IDLE_SECONDS)
        if message is None:
            message = self._work.decode(body)
        tensors = self._crew.share_tensors(tensors)
        self._agreement.doing = EVALUATING
        return message, tensors

    def _here(self, tensors: Tensors) -> Tensors:
        """A request's tensors on this rank's device. A ControlNet's stay where they are: each rank takes its own
        tokens' part. What is kept must not."""
        device = self._engine.device
        return {name: t if name.startswith(CONTROL) else t.to(device, copy=True) for name, t in tensors.items()}

    def _reply(self, message, tensors: Tensors | None = None) -> None:
        if self._control is not None:
            self._control.send(message, tensors)

    def _sample(self, request: Sample, sent: Tensors) -> None:
        def prepare() -> tuple[GuidedModel, torch.Tensor, torch.Tensor, torch.Tensor, Callable[[], None]]:
            if request.sampler not in SAMPLERS:
                raise RequestError(f"sampler {request.sampler!r} is not one of: {', '.join(SAMPLERS)}")
            unknown = request.options.keys() - SAMPLERS[request.sampler].options.keys()
            if unknown:
                raise RequestError(f"sampler {request.sampler!r} has no option {', '.join(sorted(unknown))}")
            denoiser = self._engine.denoiser(request.layout, request.settings)
            tensors = self._here(sent)
            x, sigmas = take(tensors, "x"), take(tensors, "sigmas").cpu()
            if sigmas.dim() != 1 or not len(sigmas):
                raise RequestError(f"sigmas {tuple(sigmas.shape)} are no list of levels")
            draws = SAMPLERS[request.sampler].noise_draws(sigmas, request.options)
            noise = tensors.get("noise", x.new_empty(0, *x.shape))
            if noise.shape != (draws, *x.shape):
                raise RequestError(
                    f"{request.sampler} takes {draws} draws of noise {tuple(x.shape)}, got {tuple(noise.shape)}"
                )
            methods = request.reference_methods
            positive = Prompt.from_tensors(tensors, methods.get("positive"), "positive.")
            negative = None
            if "negative.context" in tensors:
                negative = Prompt.from_tensors(tensors, methods.get("negative"), "negative.")
            prompts = [positive] if negative is None else [positive, negative]
            denoiser.check(x, prompts)
            # In float32, as the loop will compute them: they are looked up by value.
            evaluated = torch.tensor(SAMPLERS[request.sampler].evaluations(sigmas), dtype=torch.float32)
            timesteps = (evaluated * request.timestep_scale).tolist()
            denoiser.reserve(x, prompts, evaluations=len(timesteps))
            model = GuidedModel(
                velocities=self._velocities(request, denoiser),
                positive=positive,
                negative=negative,
                cfg=request.cfg,
                timestep_scale=request.timestep_scale,
                inpainting=Inpainting.from_tensors(tensors, x),
            )
            return model, x, sigmas, noise, lambda: denoiser.prepare(timesteps, prompts)

        model, x, sigmas, noise, begin = self._prepare(request, prepare)
        last = time.perf_counter()

        def report(state: StepState) -> None:
            def step() -> Step:  # made when the step is done, not when it is queued
                nonlocal last
                seconds, last = time.perf_counter() - last, time.perf_counter()
                return Step(
                    id=request.id,
                    index=state.index,
                    total=len(sigmas) - 1,
                    sigma=float(state.sigma),
                    seconds=seconds,
                )

            self._reply(step, {"x": state.x, "denoised": state.denoised})

        run = SAMPLERS[request.sampler].run
        with torch.inference_mode():
            begin()  # an exchange, so no part of what is prepared
            output = run(model, x, sigmas, noise=iter(noise), callback=report, **request.options)
        self._finish(request, output)

    def _evaluate(self, request: Evaluate, sent: Tensors) -> None:
        def prepare() -> tuple[BatchedDenoiser, Prompt, torch.Tensor, torch.Tensor, Residuals]:
            denoiser = self._engine.denoiser(request.layout, request.settings)
            tensors = self._here(sent)
            x, conditioning = take(tensors, "x"), self._prompts.conditioning(request, tensors)
            control = residuals_of(request.control, tensors)
            denoiser.check(x, [conditioning], control)
            timestep = take(tensors, "timestep").cpu()
            if timestep.shape != x.shape[:1]:
                raise RequestError(
                    f"timestep {tuple(timestep.shape)} does not fit the latents: expected {len(x)} values"
                )
            denoiser.reserve(x, [conditioning], control)
            return denoiser, conditioning, x, timestep, control

        denoiser, conditioning, x, timestep, control = self._prepare(request, prepare)
        (output,) = self._velocities(request, denoiser, control)(x, timestep, [conditioning])
        self._finish(request, output)

    def _finish(self, request: Request, output: torch.Tensor) -> None:
        """Answers, but not with what may have been computed from a file that was written to meanwhile."""
        try:
            self._engine.check_file()
        except CheckpointError as error:
            self._reply(Failed(id=request.id, kind="refused", rank=0, text=str(error)))
        else:
            self._reply(Done(id=request.id), {"output": output})

    def _patch(self, request: Patch, tensors: Tensors) -> None:
        self._residency.bring(request, lambda: self._engine.describe(request.model))
        count = len(request.weights)
        self._reply(Phase(id=request.id, text=f"patching {count} weight{'s' * (count != 1)}"))
        change = {"base": request.base, "number": request.number}
        self._agreement.together_or_drop(lambda: self._engine.patch(request.weights, tensors, **change), PATCHING)
        self._residency.tell(request.id, patched=True)
        self._reply(Done(id=request.id))

    def _prepare(self, request: Request, build):
        """Loads the model and calls `build`; raises Refused on all ranks when any of them failed.

        They agree on the model first: its reading is shared, and connecting makes a mesh: all ranks must come for both.
        """
        self._residency.bring(request, lambda: self._check(request))
        self._agreement.connect(request)
        prepared = self._agreement.together_or_drop(build, PREPARING)
        self._residency.tell(request.id)
        return prepared

    def _check(self, request: Request) -> None:
        layout = request.layout
        if layout.ranks != self._crew.size:
            raise LayoutError(f"layout {layout} does not fit a pool of {self._crew.size} ranks")
        heads = self._engine.describe(request.model).heads
        if heads % layout.ulysses:
            raise LayoutError(
                f"a Ulysses degree of {layout.ulysses} does not divide the model's {heads} attention heads"
            )
        patches = self._engine.patches if self._engine.holds(request.model) else 0
        if patches != request.patches:
            raise PatchesLost(f"the weights hold patch set {patches}, not {request.patches}")

    def _velocities(self, request: Request, denoiser: BatchedDenoiser, control: Residuals = NO_RESIDUALS):
        """The denoiser with the ranks' agreement before each evaluation; raises Cancelled on all of them alike."""

        def go_on() -> None:
            self._limit_run_ahead()
            stop = self._control is not None and self._control.cancelled(request.id)
            if self._crew.agree(stop):
                raise Cancelled(f"request {request.id}")

        def velocities(x: torch.Tensor, timestep: torch.Tensor, prompts: list[Prompt]) -> list[torch.Tensor]:
            return denoiser(x, timestep, prompts, go_on, control)

        return velocities

    def _limit_run_ahead(self) -> None:
        if self._engine.device.type != "cuda":
            return
        launched = torch.cuda.Event()
        launched.record()
        self._launched.append(launched)
        if len(self._launched) >= IN_FLIGHT:
            self._launched.popleft().synchronize()
