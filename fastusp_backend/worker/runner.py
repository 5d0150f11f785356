"""The work of a rank: take the next request, prepare it, run it, with all other ranks, for ever.

A request has two parts. While it is prepared nothing is exchanged between the models, so an error on any rank is
gathered and refused, and the pool goes on. Once it runs, an error on one rank would leave the others waiting inside
an exchange: it is fatal to the pool, and the client starts a new one.
"""

import logging
import time
from collections import deque

import msgspec
import torch

from ..config import ModelSpec
from ..engine import BatchedDenoiser, Engine
from ..errors import Cancelled, FastUSPError, LayoutError, PatchesLost, RequestError
from ..models.family import NO_RESIDUALS, Conditioning, Residuals
from ..protocol import Done, Evaluate, Failed, Patch, Phase, Release, Sample, Shutdown, Step
from ..protocol.messages import Request
from ..sampling import SAMPLERS, GuidedModel, Inpainting, StepState
from .control import Control
from .crew import Crew

log = logging.getLogger(__name__)

Work = Sample | Evaluate | Patch | Release | Shutdown
Tensors = dict[str, torch.Tensor]

_OPTIONAL = ("y", "guidance", "concat")

IN_FLIGHT = 2
"""Evaluations that a GPU may have before it, the running one too: it never waits for its CPU, and a cancel is felt."""


class Runner:
    """control is given on rank 0 alone: the others follow."""

    def __init__(self, crew: Crew, engine: Engine, control: Control | None):
        self._crew = crew
        self._engine = engine
        self._control = control
        self._kept: dict[int, torch.Tensor] = {}
        self._conditionings: dict[tuple[tuple, tuple[int, ...]], Conditioning] = {}
        self._work = msgspec.msgpack.Decoder(Work)
        self._launched: deque[torch.cuda.Event] = deque()

    def serve(self) -> None:
        """Returns after Shutdown."""
        while True:
            message, tensors = self._next()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Release):
                self._engine.release()
                self._kept.clear()
                self._conditionings.clear()
                self._reply(Done(id=message.id))
                continue
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
            except _Refused as refused:
                self._reply(Failed(id=message.id, kind=refused.kind, rank=refused.rank, text=str(refused)))
            log.info("request %d (%s) took %.3f s", message.id, type(message).__name__, time.perf_counter() - started)

    def _next(self) -> tuple[Work, Tensors]:
        body = tensors = None
        if self._control is not None:
            message, tensors = self._control.next_request()
            body = msgspec.msgpack.encode(message)
        body, tensors = self._crew.share(body), self._crew.share_tensors(tensors)
        if self._control is None:
            message = self._work.decode(body)
        if isinstance(message, Patch):  # each is moved when its turn comes
            return message, tensors
        return message, {name: t.to(self._engine.device) for name, t in tensors.items()}

    def _reply(self, message, tensors: Tensors | None = None) -> None:
        if self._control is not None:
            self._control.send(message, tensors)

    def _sample(self, request: Sample, tensors: Tensors) -> None:
        def prepare() -> tuple[GuidedModel, torch.Tensor, torch.Tensor]:
            if request.sampler not in SAMPLERS:
                raise RequestError(f"sampler {request.sampler!r} is not one of: {', '.join(SAMPLERS)}")
            unknown = request.options.keys() - SAMPLERS[request.sampler].options.keys()
            if unknown:
                raise RequestError(f"sampler {request.sampler!r} has no option {', '.join(sorted(unknown))}")
            x, sigmas = _take(tensors, "x"), _take(tensors, "sigmas").cpu()
            if sigmas.dim() != 1 or not len(sigmas):
                raise RequestError(f"sigmas {tuple(sigmas.shape)} are no list of levels")
            draws = SAMPLERS[request.sampler].noise_draws(sigmas, request.options)
            noise = tensors.get("noise", x.new_empty(0, *x.shape))
            if noise.shape != (draws, *x.shape):
                raise RequestError(
                    f"{request.sampler} takes {draws} draws of noise {tuple(x.shape)}, got {tuple(noise.shape)}"
                )
            denoiser = self._engine.denoiser(request.layout, request.settings)
            methods = request.reference_methods
            positive = _conditioning(tensors, "positive.", methods.get("positive"))
            negative = None
            if "negative.context" in tensors:
                negative = _conditioning(tensors, "negative.", methods.get("negative"))
            prompts = [positive] if negative is None else [positive, negative]
            denoiser.check(x, prompts)
            # In float32, as the loop will compute them: they are looked up by value.
            evaluated = torch.tensor(SAMPLERS[request.sampler].evaluations(sigmas), dtype=torch.float32)
            denoiser.prepare((evaluated * request.timestep_scale).tolist(), prompts)
            masked = "mask" in tensors
            model = GuidedModel(
                velocities=self._velocities(request, denoiser),
                positive=positive,
                negative=negative,
                cfg=request.cfg,
                timestep_scale=request.timestep_scale,
                inpainting=Inpainting(
                    mask=_like(x, tensors, "mask"),
                    latent_image=_like(x, tensors, "latent_image"),
                    noise=_like(x, tensors, "inpaint_noise"),
                )
                if masked
                else None,
            )
            return model, x, sigmas

        model, x, sigmas = self._prepare(request, prepare)
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

        noise = iter(tensors.get("noise", ()))
        run = SAMPLERS[request.sampler].run
        with torch.inference_mode():
            output = run(model, x, sigmas, noise=noise, callback=report, **request.options)
        self._reply(Done(id=request.id), {"output": output})

    def _evaluate(self, request: Evaluate, tensors: Tensors) -> None:
        def prepare() -> tuple[BatchedDenoiser, Conditioning, torch.Tensor, torch.Tensor, Residuals]:
            x, conditioning = _take(tensors, "x"), self._kept_conditioning(request, tensors)
            control = _residuals(request.control, tensors)
            denoiser = self._engine.denoiser(request.layout, request.settings)
            denoiser.check(x, [conditioning], control)
            timestep = _take(tensors, "timestep").cpu()
            if timestep.shape != x.shape[:1]:
                raise RequestError(
                    f"timestep {tuple(timestep.shape)} does not fit the latents: expected {len(x)} values"
                )
            return denoiser, conditioning, x, timestep, control

        denoiser, conditioning, x, timestep, control = self._prepare(request, prepare)
        (output,) = self._velocities(request, denoiser, control)(x, timestep, [conditioning])
        self._reply(Done(id=request.id), {"output": output})

    def _patch(self, request: Patch, tensors: Tensors) -> None:
        self._together(lambda: self._engine.describe(request.model))
        self._hold(request.id, request.model)
        self._reply(Phase(id=request.id, text=f"patching {len(request.weights)} weights"))
        change = {"base": request.base, "number": request.number}
        self._together(lambda: self._engine.patch(request.weights, tensors, **change))
        self._reply(Done(id=request.id))

    def _kept_conditioning(self, request: Evaluate, tensors: Tensors) -> Conditioning:
        """The request's prompt. The same kept tensors give the same object, so that what was computed from it lasts."""
        for number in request.forget:
            self._kept.pop(number, None)
            self._conditionings = {k: v for k, v in self._conditionings.items() if number not in k[1]}
        for name, number in request.keep.items():
            self._kept[number] = _take(tensors, name)
        for name, number in request.reuse.items():
            if number not in self._kept:
                raise RequestError(f"tensor {name!r} should have been kept as {number}, but was not")
            tensors[name] = self._kept[number]
        numbers, method = request.keep | request.reuse, request.reference_method
        conditioning = _conditioning(tensors, "", method)
        names = [name for name in tensors if name in ("context", *_OPTIONAL) or name.startswith("reference.")]
        if any(name not in numbers for name in names):
            return conditioning  # not all of it was kept
        names.sort()
        key = (*names, method), tuple(numbers[name] for name in names)
        return self._conditionings.setdefault(key, conditioning)

    def _prepare(self, request: Request, build):
        """Loads the model and calls `build`; raises _Refused on all ranks when any of them failed.

        They agree on the model first: its reading is shared, and `build` makes a mesh: all ranks must come for both.
        All hold the same model at any time, or none.
        """
        self._together(lambda: self._check(request))
        self._hold(request.id, request.model)
        return self._together(build)

    def _hold(self, request: int, model: ModelSpec) -> None:
        """Loads a model that was described."""
        if self._engine.holds(model):
            return
        self._reply(Phase(id=request, text="loading the model"))
        started = time.perf_counter()
        try:
            self._together(self._engine.make_room)
            self._together(self._engine.load)
        except _Refused:
            self._engine.release()
            raise
        log.info("loaded %s in %.2f s", model.path, time.perf_counter() - started)

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

    def _together(self, prepare):
        """prepare(), or _Refused when it failed on any rank. Where memory ran out on one, all drop the model."""
        problem, prepared = "", None
        try:
            prepared = prepare()
        except PatchesLost as error:
            problem = f"unpatched\n{error}"
        except (FastUSPError, ValueError) as error:
            problem = f"refused\n{error}"
        except (torch.OutOfMemoryError, MemoryError) as error:
            problem = f"out_of_memory\n{error}"
        problems = self._crew.gather(problem)
        if any(text.startswith("out_of_memory") for text in problems):
            self._engine.release()  # only now: the exception's traceback held tensors
        for rank, text in enumerate(problems):
            if text:
                raise _Refused(rank, *text.split("\n", 1))
        return prepared

    def _velocities(self, request: Request, denoiser: BatchedDenoiser, control: Residuals = NO_RESIDUALS):
        """The denoiser with the ranks' agreement before each evaluation; raises Cancelled on all of them alike."""

        def go_on() -> None:
            self._limit_run_ahead()
            stop = self._control is not None and self._control.cancelled(request.id)
            if self._crew.agree(stop):
                raise Cancelled(f"request {request.id}")

        def velocities(x: torch.Tensor, timestep: torch.Tensor, prompts: list[Conditioning]) -> list[torch.Tensor]:
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


class _Refused(Exception):
    def __init__(self, rank: int, kind: str, text: str):
        super().__init__(text)
        self.rank = rank
        self.kind = kind


def _take(tensors: Tensors, name: str) -> torch.Tensor:
    if name not in tensors:
        raise RequestError(f"the request lacks tensor {name!r}")
    return tensors[name]


def _like(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    tensor = _take(tensors, name)
    try:
        return tensor.expand(x.shape)
    except RuntimeError as error:
        raise RequestError(
            f"tensor {name!r} {tuple(tensor.shape)} does not fit the latents {tuple(x.shape)}"
        ) from error


def _conditioning(tensors: Tensors, prefix: str, reference_method: str | None) -> Conditioning:
    references = []
    while (name := f"{prefix}reference.{len(references)}") in tensors:
        references.append(tensors[name])
    return Conditioning(
        context=_take(tensors, prefix + "context"),
        references=tuple(references),
        reference_method=reference_method,
        **{name: tensors.get(prefix + name) for name in _OPTIONAL},
    )


def _residuals(control: dict[str, list[int | None]], tensors: Tensors) -> Residuals:
    last = max((n for places in control.values() for n in places if n is not None), default=-1)
    return Residuals(
        tuple(_take(tensors, f"control.{n}") for n in range(last + 1)),
        *(tuple(control.get(kind, ())) for kind in ("input", "output")),
    )
