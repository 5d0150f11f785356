"""One model under one layout on one pool, as its users see it: evaluate, or sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import Layout, ModelSpec, Settings
from ..errors import PatchesLost, RequestError
from ..protocol import Evaluate, Message, Patch, Sample
from .kept import Tensors
from .patches import NO_PATCHES, WeightPatches
from .pool import QUIET, Pool, Progress


@dataclass(frozen=True, slots=True)
class Prompt:
    """Conditioning as tensors: context (B, T, E), y (B, V) pooled text, guidance (B,) or (1,)."""

    context: torch.Tensor
    y: torch.Tensor | None = None
    guidance: torch.Tensor | None = None

    def tensors(self) -> Tensors:
        named = {"context": self.context, "y": self.y, "guidance": self.guidance}
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """mask: 1 where sampled, 0 where latent_image is kept; noise: what the kept part is noised with. All as x."""

    mask: torch.Tensor
    latent_image: torch.Tensor
    noise: torch.Tensor


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

    def evaluate(self, x: torch.Tensor, timestep: torch.Tensor, prompt: Prompt, progress: Progress) -> torch.Tensor:
        """One evaluation: x (B, C, h, w), timestep (B,) -> velocity (B, C, h, w) on the CPU. Raises as `Pool.run`."""
        while True:
            self.pool.start()
            epoch = self.pool.epoch
            try:
                with self.pool.kept.lock:
                    return self._evaluate_once(x, timestep, prompt, progress, epoch)
            except RequestError:
                if self.pool.epoch == epoch:
                    raise
                # The workers were replaced between `start` and `run`, and the new ones hold nothing yet: send all.

    def _evaluate_once(self, x, timestep, prompt: Prompt, progress: Progress, epoch: int) -> torch.Tensor:
        send, keep, reuse, forget = self.pool.kept.sort(prompt.tensors(), epoch)

        def request(number: int, patches: int) -> Evaluate:
            what = self._what(len(x), patches)
            return Evaluate(id=number, **what, keep=keep, reuse=reuse, forget=forget)

        try:
            return self._run(request, {"x": x, "timestep": timestep, **send}, progress)["output"]
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
        mask: Mask | None = None,
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
            tensors |= {"mask": mask.mask, "latent_image": mask.latent_image, "inpaint_noise": mask.noise}
        return self._run(
            lambda number, patches: Sample(
                id=number,
                **self._what(len(x) if negative is None else 2, patches),
                sampler=sampler,
                options=options or {},
                timestep_scale=timestep_scale,
                cfg=cfg,
            ),
            tensors,
            progress,
        )["output"]

    def layout(self, evaluations: int) -> Layout:
        """The layout for a step of so many evaluations: images of a batch, or 2 for a guided one.

        Where none divides them it is the last, which the workers then refuse.
        """
        return next((x for x in self.layouts if evaluations % x.batch == 0), self.layouts[-1])

    def _what(self, evaluations: int, patches: int) -> dict:
        layout = self.layout(evaluations)
        return {"model": self.model, "layout": layout, "settings": self.settings, "patches": patches}

    def _run(self, make: Callable[[int, int], Message], tensors: Tensors, progress: Progress) -> Tensors:
        """`Pool.run` of make(id, patch set), with this session's patches in the workers' weights. Workers that turn out
        not to hold what they should get all of it once more."""
        with self.pool.patches.lock:
            try:
                return self._run_patched(make, tensors, progress)
            except PatchesLost:
                self.pool.patches.forget()
                return self._run_patched(make, tensors, progress)

    def _run_patched(self, make: Callable[[int, int], Message], tensors: Tensors, progress: Progress) -> Tensors:
        held = self.pool.patches
        self.pool.start()
        patches, change = held.change(self.patches, self.model, self.pool.epoch)
        if change is not None:
            what = {"model": self.model, "number": patches, "base": change.base, "weights": change.weights}
            try:
                self.pool.run(lambda number: Patch(id=number, **what), change.tensors, progress)
            except BaseException:
                held.forget()
                raise
            held.made(change, self.patches)
        return self.pool.run(lambda number: make(number, patches), tensors, progress)
