"""The batch axis: groups of ranks evaluate different prompts (cond and uncond) or different images of a batch.

Nothing travels per layer; the groups exchange finished velocities. On two ranks a guided step takes the time of one
evaluation on one rank, which sharing each sequence does not reach.
"""

import weakref
from collections.abc import Callable, Sequence

import torch

from ..comm.collective import GroupExchange
from ..errors import RequestError
from ..models.family import NO_RESIDUALS, Residuals
from ..prompt import Prompt
from .denoiser import Denoiser
from .modulations import ModulationTable

NO_IMAGES = slice(0, 0)


class BatchedDenoiser:
    """velocities = batched(x, timestep, conditionings): every prompt evaluated at the same x, by all batch groups.

    With several prompts, groups share out the prompts; with one, the images of the batch. Modulations are computed by
    all ranks for all of them; owners: see `ModulationTable`.
    """

    def __init__(self, denoiser: Denoiser, owners: Sequence[int] | None = None):
        self.denoiser = denoiser
        self._modulations = ModulationTable(denoiser.model, denoiser.dtype, owners)
        mesh = denoiser.mesh
        self._groups, self._position = mesh.layout.batch, mesh.batch_position
        self._exchange = GroupExchange(mesh.batch) if mesh.batch else None
        self._parts: weakref.WeakKeyDictionary[Prompt, Prompt] = weakref.WeakKeyDictionary()

    def check(self, x: torch.Tensor, conditionings: Sequence[Prompt], control: Residuals = NO_RESIDUALS) -> None:
        """Raises RequestError for tensors that do not fit the model, or that the batch groups do not divide."""
        for conditioning in conditionings:
            self.denoiser.check(x, conditioning, control)
        count = len(conditionings) if len(conditionings) > 1 else len(x)
        if count % self._groups:
            raise RequestError(f"{self._groups} batch groups do not divide {count} evaluations a step")

    def prepare(self, timesteps: list[float], conditionings: Sequence[Prompt]) -> None:
        """Computes the modulations of all of these timesteps, in one product per layer and one gather for up to
        `AT_ONCE` rows. Collective over all ranks."""
        self._modulations.prepare(timesteps, conditionings, self._shares(conditionings))

    def reserve(
        self,
        x: torch.Tensor,
        conditionings: Sequence[Prompt],
        control: Residuals = NO_RESIDUALS,
        *,
        evaluations: int = 1,
    ) -> None:
        """Raises torch.OutOfMemoryError where this group's evaluations of x, and the modulations of that many, would
        not find their memory."""
        images = self._images(x, conditionings)
        _table = self._modulations.reserve(evaluations, conditionings, self._shares(conditionings))  # beside the rest
        for conditioning in self._mine(conditionings):
            self.denoiser.reserve(x[images], conditioning, control.of_images(images))

    def __call__(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditionings: Sequence[Prompt],
        before_each: Callable[[], None],
        control: Residuals = NO_RESIDUALS,
    ) -> list[torch.Tensor]:
        """x (B, C, h, w), timestep (B,) on the CPU -> a velocity (B, C, h, w) per prompt, with one `control` for all.

        before_each runs ahead of every evaluation of this group, as often on all ranks. Collective over all ranks.
        """
        images, shares = self._images(x, conditionings), self._shares(conditionings)
        before_each()
        rows = self._modulations.rows(tuple(timestep.tolist()), conditionings, shares)
        rows = [of for of, share in zip(rows, shares, strict=True) if share != NO_IMAGES]
        velocities = []
        for number, (conditioning, modulations) in enumerate(zip(self._mine(conditionings), rows, strict=True)):
            if number:
                before_each()
            velocity = self.denoiser(x[images], modulations, conditioning, control.of_images(images))
            velocities.append(velocity.clone())
        if self._exchange is None:
            return velocities
        everything = self._exchange.all_gather(torch.stack(velocities))()  # (groups, prompts of a group, images, ...)
        return list(everything.flatten(0, 1)) if len(conditionings) > 1 else [everything.flatten(0, 2)]

    def forget_prompts(self) -> None:
        """Drops what was computed from prompts, after weights have changed. On all ranks alike."""
        self._modulations.forget()
        self.denoiser.forget_prompts()

    def _shares(self, conditionings: Sequence[Prompt]) -> list[slice]:
        """Of each prompt, the images that this group evaluates."""
        if len(conditionings) == 1:
            return [self._images(conditionings[0].context, conditionings)]
        count = len(conditionings) // self._groups
        return [slice(None) if i // count == self._position else NO_IMAGES for i in range(len(conditionings))]

    def _images(self, x: torch.Tensor, conditionings: Sequence[Prompt]) -> slice:
        """This group's images: all of them, where the groups share out the prompts."""
        if self._groups == 1 or len(conditionings) > 1:
            return slice(None)
        count = len(x) // self._groups
        return slice(self._position * count, (self._position + 1) * count)

    def _mine(self, conditionings: Sequence[Prompt]) -> Sequence[Prompt]:
        if self._groups == 1:
            return conditionings
        if len(conditionings) == 1:
            return [self._part(conditionings[0])]
        count = len(conditionings) // self._groups
        return conditionings[self._position * count : (self._position + 1) * count]

    def _part(self, conditioning: Prompt) -> Prompt:
        """This group's images of a prompt; the same object each time, so that what is computed from it is kept."""
        if conditioning not in self._parts:
            rows = len(conditioning.context) // self._groups
            mine = slice(self._position * rows, (self._position + 1) * rows)
            self._parts[conditioning] = conditioning.of_images(mine)
        return self._parts[conditioning]
