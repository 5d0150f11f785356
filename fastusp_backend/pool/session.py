"""One model under one layout on one pool, as its users see it: evaluate, or sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from ..config import Layout, ModelSpec, Settings
from ..errors import PatchesLost, RequestError
from ..prompt import Inpainting, Prompt, Tensors
from ..protocol import Evaluate, Message, Patch, Sample
from .patches import NO_PATCHES, WeightPatches
from .pool import Pool
from .progress import QUIET, Progress

Control = Mapping[str, Sequence[torch.Tensor | None]]
"""A ControlNet's residuals as ComfyUI has them: under `input` (FLUX's double blocks, Qwen-Image's) and `output` (FLUX's
single blocks), per block (B or 1, n, hidden) or None."""


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

    def evaluate(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        progress: Progress,
        control: Control | None = None,
    ) -> torch.Tensor:
        """One evaluation: x (B, C, h, w), timestep (B,) -> velocity (B, C, h, w) on the CPU. Raises as `Pool.run`."""
        while True:
            self.pool.start()
            epoch = self.pool.epoch
            try:
                with progress.holding(self.pool.kept.lock):
                    return self._evaluate_once(x, timestep, prompt, progress, control or {}, epoch)
            except RequestError:
                if self.pool.epoch == epoch:
                    raise
                # The workers were replaced between `start` and `run`, and the new ones hold nothing yet: send all.

    def _evaluate_once(
        self, x, timestep, prompt: Prompt, progress: Progress, control: Control, epoch: int
    ) -> torch.Tensor:
        places, residuals = _distinct(control, getattr(torch, self.model.compute))
        send, keep, reuse, forget = self.pool.kept.sort(prompt.tensors(), epoch)

        def request(number: int, patches: int) -> Evaluate:
            return Evaluate(
                id=number,
                **self._what(len(x), patches),
                keep=keep,
                reuse=reuse,
                forget=forget,
                reference_method=prompt.reference_method,
                control=places,
            )

        try:
            return self._run(request, {"x": x, "timestep": timestep, **send, **residuals}, progress)["output"]
        except BaseException:
            self.pool.kept.distrust(forget)
            raise

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
        progress: Progress = QUIET,
    ) -> torch.Tensor:
        """A sampling loop: noised x (B, C, h, w), sigmas (n + 1,) -> latents, as x, on the CPU. Raises as `Pool.run`.

        noise (k, B, C, h, w): the sampler's draws (`sampling.SAMPLERS[sampler].noise_draws` says how many).
        """
        tensors = {"x": x, "sigmas": sigmas}
        tensors |= {f"positive.{name}": t for name, t in positive.tensors().items()}
        if negative is not None:
            tensors |= {f"negative.{name}": t for name, t in negative.tensors().items()}
        if noise is not None:
            tensors["noise"] = noise
        if mask is not None:
            tensors |= mask.tensors()
        return self._run(
            lambda number, patches: Sample(
                id=number,
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
            ),
            tensors,
            progress,
        )["output"]

    def holds(self) -> int:
        """Bytes of this session's weights on each device now; 0 while they are parked, dropped or not loaded yet."""
        held = self.pool.held
        return held.nbytes if held and held.state == "resident" and held.model == self.spec else 0

    def settle(self) -> None:
        """After a sampling run: what becomes of large shared memory, and of the weights, as `residency` says."""
        self.pool.unmap()
        if self.settings.residency != "keep":
            self.give_way()

    def give_way(self) -> None:
        """Makes room on the devices for somebody else: parks the weights where they are to be parked, else drops
        them."""
        if self.settings.residency == "park":
            self.pool.park()
        else:
            self.pool.release()

    def layout(self, evaluations: int) -> Layout:
        """The layout for a step of so many evaluations: images of a batch, or 2 for a guided one.

        The last of `planner.plan_batches` has no groups and takes any number; of other layouts, where none divides
        them it is the last, which the workers then refuse.
        """
        return next((x for x in self.layouts if evaluations % x.batch == 0), self.layouts[-1])

    def _what(self, evaluations: int, patches: int) -> dict:
        # What becomes of the weights later is no reason to make graphs anew.
        settings = msgspec.structs.replace(self.settings, residency="keep")
        layout = self.layout(evaluations)
        return {"model": self.spec, "layout": layout, "settings": settings, "patches": patches}

    @property
    def spec(self) -> ModelSpec:
        """The model as the workers hold it."""
        return msgspec.structs.replace(self.model, linear=self.settings.linear)

    def _run(self, make: Callable[[int, int], Message], tensors: Tensors, progress: Progress) -> Tensors:
        """`Pool.run` of make(id, patch set), with this session's patches in the workers' weights. Workers that turn out
        not to hold what they should get all of it once more."""
        with progress.holding(self.pool.patches.lock):
            try:
                return self._run_patched(make, tensors, progress)
            except PatchesLost:
                self.pool.patches.forget()
                return self._run_patched(make, tensors, progress)

    def _run_patched(self, make: Callable[[int, int], Message], tensors: Tensors, progress: Progress) -> Tensors:
        held = self.pool.patches
        self.pool.start()
        patches, change = held.change(self.patches, self.spec, self.pool.epoch)
        if change is not None:
            what = {"model": self.spec, "number": patches, "base": change.base, "weights": change.weights}
            try:
                self.pool.run(lambda number: Patch(id=number, **what), change.tensors, progress)
            except BaseException:
                held.forget()
                raise
            held.made(change, self.patches)
        return self.pool.run(lambda number: make(number, patches), tensors, progress)


def _distinct(control: Control, dtype: torch.dtype) -> tuple[dict[str, list[int | None]], Tensors]:
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
