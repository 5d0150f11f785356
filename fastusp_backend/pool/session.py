"""One model under one layout on one pool, as its users see it: evaluate, or sample.

A request and the patches that it needs are one turn at the workers (`Pool.run`). What is sent in it follows from what
these workers were sent before (`sent`), so it is made inside the turn, and anew for workers that replace them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from ..config import CacheRule, Layout, ModelSpec, Settings
from ..devices import ServerDevices
from ..errors import OutOfRoom, PatchesLost, TensorsLost
from ..prompt import Inpainting, Prompt, Tensors
from ..protocol import Evaluate, Patch, Sample
from ..read_ahead import read_ahead
from .contact import Contact
from .patches import NO_PATCHES, WeightPatches
from .pool import Pool
from .progress import QUIET, Progress
from .request import submit

ControlNetResiduals = Mapping[str, Sequence[torch.Tensor | None]]
"""A ControlNet's residuals as ComfyUI has them: under `input` (FLUX's double blocks, Qwen-Image's) and `output` (FLUX's
single blocks, Stable Diffusion 3's), per block (B or 1, n, hidden) or None."""

_READ_HERE = {
    name: getattr(Settings(), name) for name in ("residency", "cache", "cache_threshold", "cache_start", "cache_end")
}
"""The settings that ranks never read, as they are sent."""


@dataclass(frozen=True, slots=True)
class Session:
    """Cheap to make: processes start with the first call, weights load there too.

    layouts: as `planner.plan_batches` gives them; a request takes the first whose batch groups divide its evaluations.
    patches: what the model's weights are changed by, before the first request that wants it.
    """

    pool: Pool
    model: ModelSpec
    layouts: tuple[Layout, ...]
    settings: Settings
    patches: WeightPatches = NO_PATCHES

    def start(self) -> None:
        """Starts the pool's processes, if none run, without waiting for them. Where some begin on this machine, it
        reads the model's file into its cache meanwhile, as long as they live."""
        before = self.pool.starts
        workers = self.pool.start()
        if self.pool.starts > before and not isinstance(self.pool.devices, ServerDevices):
            read_ahead(self.model.path, lambda: workers.alive)

    def evaluate(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        progress: Progress,
        control: ControlNetResiduals | None = None,
        skipped: Sequence[int] = (),
    ) -> torch.Tensor:
        """Evaluates the model once: x (B, C, h, w), timestep (B,) -> velocity (B, C, h, w) on the CPU. skipped: the
        numbers of blocks that are left out. Raises as `submit`."""
        progress = self.pool.following(progress)
        places, residuals = _distinct(control or {}, getattr(torch, self.model.compute))

        def request(workers: Contact, patches: int) -> Tensors:
            delivery = workers.tensors.deliver(prompt.tensors())
            message = Evaluate(
                id=workers.next_id(),
                **self._what(len(x), patches),
                keep=delivery.keep,
                reuse=delivery.reuse,
                forget=delivery.forget,
                reference_method=prompt.reference_method,
                control=places,
                skipped=sorted(skipped),
            )
            answer = submit(workers, message, {"x": x, "timestep": timestep, **delivery.send, **residuals}, progress)
            workers.tensors.confirm(delivery)
            return answer

        return self._run(request, progress)

    def sample(
        self,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        *,
        sampler: str,
        positive: Prompt,
        negative: Prompt | None = None,
        cfg: float = 1.0,
        options: dict[str, float] | None = None,
        noise: torch.Tensor | None = None,
        mask: Inpainting | None = None,
        timestep_scale: float = 1.0,
        cache: CacheRule | None = None,
        progress: Progress = QUIET,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Samples in a loop: noised x (B, C, h, w), sigmas (n + 1,) -> latents, as x, on the CPU. Raises as `submit`.

        noise (k, B, C, h, w): the sampler's draws (`sampling.SAMPLERS[sampler].noise_draws` says how many).
        cache: which evaluations are skipped; None leaves it to the settings. `Progress.done` is told how many were.
        meanwhile: called while the workers prepare; what it raises cancels the run, as from `progress`.
        """
        cache = cache or self.settings.cache_rule(sigmas.tolist())
        progress = self.pool.following(progress, cached=cache is not None)
        tensors = {"x": x, "sigmas": sigmas}
        tensors |= {f"positive.{name}": t for name, t in positive.tensors().items()}
        if negative is not None:
            tensors |= {f"negative.{name}": t for name, t in negative.tensors().items()}
        if noise is not None:
            tensors["noise"] = noise
        if mask is not None:
            tensors |= mask.tensors()

        def request(workers: Contact, patches: int) -> Tensors:
            message = Sample(
                id=workers.next_id(),
                **self._what(len(x) if negative is None else 2, patches),
                sampler=sampler,
                options=options or {},
                timestep_scale=timestep_scale,
                cfg=cfg,
                reference_methods={
                    name: prompt.reference_method
                    for name, prompt in (("positive", positive), ("negative", negative))
                    if prompt is not None and prompt.reference_method is not None
                },
                cache=cache,
            )
            return submit(workers, message, tensors, progress, meanwhile)

        return self._run(request, progress)

    def resident_bytes(self) -> int:
        """Gives the bytes of this session's weights on each device now; 0 while they are parked, dropped or not loaded
        yet."""
        held = self.pool.held
        if held is None or held.state != "resident":
            return 0
        own, theirs = (msgspec.structs.replace(spec, unpack=False) for spec in (self.spec, held.model))
        return held.nbytes if own == theirs else 0

    def after_run(self) -> None:
        """Gives large shared memory back, and does with the weights as `residency` says. For the end of a sampling
        run."""
        self.pool.unmap()
        if self.settings.residency != "keep":
            self.evict()

    def make_room(self) -> None:
        """Makes room on the devices for somebody else. Weights that were unpacked come back as their file has them."""
        held = self.pool.held
        self.evict()
        if held is not None and held.unpacked:
            self.pool.crowded = True

    def evict(self) -> None:
        """Has the weights leave the devices: parks them where they are to be parked, else drops them, as those that
        another session had unpacked."""
        held = self.pool.held
        if self.settings.residency == "park" and not (held and held.unpacked):
            self.pool.park()
        else:
            self.pool.release()

    def layout(self, evaluations: int) -> Layout:
        """Chooses the layout for a step of so many evaluations: images of a batch, or 2 for a guided one.

        The last of `planner.plan_batches` has no groups and takes any number; of other layouts, where none divides
        them it is the last, which the workers then refuse.
        """
        return next((x for x in self.layouts if evaluations % x.batch == 0), self.layouts[-1])

    def _what(self, evaluations: int, patches: int) -> dict:
        # What the client alone reads is no reason to make graphs anew.
        settings = msgspec.structs.replace(self.settings, **_READ_HERE)
        layout = self.layout(evaluations)
        return {"model": self.spec, "layout": layout, "settings": settings, "patches": patches}

    @property
    def spec(self) -> ModelSpec:
        """The model as the workers load it. What the loader leaves as the file has it may be unpacked, but for weights
        that are parked, since the host's memory would have to hold as much."""
        settings = self.settings
        unpack = self.model.keep_quantised and settings.residency != "park" and not self.pool.crowded
        return msgspec.structs.replace(self.model, linear=settings.linear, weights=settings.weights, unpack=unpack)

    def _run(self, request: Callable[[Contact, int], Tensors], progress: Progress) -> torch.Tensor:
        """Gives the output of request(workers, patch set), with this session's patches in the workers' weights. Workers
        that turn out to have lost them, or the prompt's tensors, get all of them once more; unpacked weights that leave
        too little room are read anew, as their file has them."""

        def patched(workers: Contact) -> torch.Tensor:
            return request(workers, self._patch(workers, progress))["output"]

        def run(workers: Contact) -> torch.Tensor:
            workers.settings = self.settings
            lost, gave_way = set(), False
            while True:
                unpack = self.spec.unpack
                try:
                    return patched(workers)
                except (PatchesLost, TensorsLost) as error:
                    if type(error) in lost:
                        raise
                    lost.add(type(error))
                    if isinstance(error, PatchesLost):
                        workers.patches.doubt()  # the tensors are in doubt without it: their request was not answered
                except OutOfRoom:
                    held = workers.held
                    if not unpack or held and held.state == "resident" and not held.unpacked:
                        if gave_way:
                            self.pool.crowded = False  # it helped nothing
                        raise
                    self.pool.crowded = gave_way = True

        return self.pool.run(run, progress)

    def _patch(self, workers: Contact, progress: Progress) -> int:
        """Brings this session's patches into the workers' weights, and gives the number of the set."""
        number, change = workers.patches.change(self.patches, self.spec)
        if change is not None:
            what = {"model": self.spec, "number": number, "base": change.base, "weights": change.weights}
            submit(workers, Patch(id=workers.next_id(), **what), change.tensors, progress)
            workers.patches.confirm(change, self.patches)
        return number


def _distinct(control: ControlNetResiduals, dtype: torch.dtype) -> tuple[dict[str, list[int | None]], Tensors]:
    """(`Evaluate.control`, its tensors in `dtype`): none travels twice. ControlNets of few blocks give one tensor to
    several of the model's; where two are stacked, ComfyUI adds theirs block by block: equal tensors, not the same."""
    numbers: dict[int, int] = {}  # by identity
    alike: dict[tuple, list[int]] = {}
    distinct: list[torch.Tensor] = []

    def number(tensor: torch.Tensor) -> int:
        key = tensor.shape, tensor.dtype, tensor.device, *tensor.flatten()[:8].tolist()
        known = alike.setdefault(key, [])
        for n in known:
            if torch.equal(distinct[n], tensor):
                return n
        known.append(len(distinct))
        distinct.append(tensor)
        return known[-1]

    def place(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in numbers:
            repeats = tensor.dim() and tensor.stride(0) == 0  # one for all images, expanded
            numbers[id(tensor)] = number(tensor[:1] if repeats else tensor)
        return numbers[id(tensor)]

    places = {kind: [place(tensor) for tensor in residuals] for kind, residuals in control.items()}
    return places, {f"control.{n}": tensor.to(dtype) for n, tensor in enumerate(distinct)}
