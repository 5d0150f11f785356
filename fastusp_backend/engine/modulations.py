"""The modulations (adaLN outputs) of a prompt's evaluations: computed once each, by all ranks together, and cached.

They depend on timestep, guidance and pooled text alone, so one product per layer gives those of all timesteps of a run.
Their weights, a quarter to a third of a model, are used once a prompt then, and lie on one rank each
(models/ownership): a rank computes its own layers' outputs for all prompts of a request, an all-gather brings the
others'. Computing them in every evaluation, as the model is written, would take all of these weights on every rank and
read them at every step.

A rank that is alone in the gather would wait for ever. So what is missing must be the same on all ranks, also where
each caches the rows of its own prompts or images only: rows are asked for with the whole request, and are known by
whole batches' timesteps. Where one is missing follows from the requests alone.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..comm.collective import GroupExchange
from ..comm.groups import world
from ..models.family import Transformer
from ..models.prompts import references_of
from ..prompt import Prompt

CACHED_ROWS = 64
"""Evaluations whose modulations are cached per prompt: 2.1 MB each for FLUX.1 and Chroma, 0.2 for FLUX.2, 1.0 for
Z-Image, 4.4 for Qwen-Image in bf16, batch 1."""
ROWS_AT_ONCE = 64
"""Rows, each for one image, that are computed and gathered at a time: 135 MB of FLUX.1's, 280 of Qwen-Image's, as they
are gathered and once more in order. Fewer where one rank has more than its share: all others gather as much."""

Timesteps = tuple[float, ...]
"""One timestep per image of the batch."""

Rows = OrderedDict[Timesteps, torch.Tensor]
"""A row (images, modulation_width) per timesteps; the one that was used longest ago makes room."""


class ModulationTable:
    """Rows of modulations by prompt and timesteps.

    owners: the rank that has each of `model.modulations()`; None where this one has all of them.

    Methods take all prompts of a request and, as `Denoiser.shares` gives them, the images of each whose rows this rank
    caches: always the same of a prompt, none of another group's.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, owners: Sequence[int] | None):
        layers, (rank, ranks) = model.modulations(), world() if owners else (0, 1)
        self._model, self._dtype = model, dtype
        self._exchange = GroupExchange(dist.group.WORLD) if ranks > 1 else None
        widths = [0] * ranks
        self._places: list[tuple[int, slice]] = []  # of each layer: its owner, and where in that rank's part
        for layer, owner in zip(layers, owners or [0] * len(layers), strict=True):
            start, widths[owner] = widths[owner], widths[owner] + layer.out_features
            self._places.append((owner, slice(start, widths[owner])))
        self._own = [(layer, c) for layer, (owner, c) in zip(layers, self._places, strict=True) if owner == rank]
        self._widest, self._ranks = max(widths), ranks
        self._uneven = round(ranks * self._widest / sum(widths))
        self._rows: weakref.WeakKeyDictionary[Prompt, Rows] = weakref.WeakKeyDictionary()

    def prepare(self, timesteps: list[float], prompts: Sequence[Prompt], shares: Sequence[slice]) -> None:
        """Computes the rows of these timesteps. Collective over all ranks."""
        whole = [[(t,) * len(prompt.context) for t in timesteps] for prompt in prompts]
        wanted = [dict.fromkeys(self._at_zero(prompt) + keys) for prompt, keys in zip(prompts, whole, strict=True)]
        first = [list(keys)[:CACHED_ROWS] for keys in wanted]  # later ones when they are needed
        self._complete(first, prompts, shares)

    def rows(
        self, timesteps: Timesteps, prompts: Sequence[Prompt], shares: Sequence[slice]
    ) -> list[list[torch.Tensor]]:
        """Gives each prompt's row (images, modulation_width) at these timesteps and, where its references have one of
        their own, that. Collective over all ranks where one is missing."""
        wanted = [[timesteps, *self._at_zero(prompt)] for prompt in prompts]
        self._complete(wanted, prompts, shares)
        return [[self._rows[prompt][key] for key in keys] for prompt, keys in zip(prompts, wanted, strict=True)]

    def probe_memory(self, evaluations: int, prompts: Sequence[Prompt], shares: Sequence[slice]) -> torch.Tensor:
        """Allocates what the rows of so many evaluations take, frees what passes again, and returns a tensor of the
        size of those that are cached. Raises torch.OutOfMemoryError."""
        counts = [min(evaluations + len(self._at_zero(prompt)), CACHED_ROWS) for prompt in prompts]
        cached = sum(n * _count(prompt, images) for n, prompt, images in zip(counts, prompts, shares, strict=True))
        rows = sum(n * len(prompt.context) for n, prompt in zip(counts, prompts, strict=True))
        like = {"dtype": self._dtype, "device": prompts[0].context.device}
        table = torch.empty(cached * self._model.modulation_width, **like)
        gathered = self._widest * (1 + self._ranks if self._exchange else 1)
        torch.empty(min(rows, self._at_once) * (gathered + self._model.modulation_width), **like)  # and free it
        return table

    @property
    def _at_once(self) -> int:
        return max(1, ROWS_AT_ONCE // self._uneven)

    def forget(self) -> None:
        """Drops all rows."""
        self._rows.clear()

    def _at_zero(self, prompt: Prompt) -> list[Timesteps]:
        """The row that a prompt's references take beside the image's, where they are modulated as at timestep 0."""
        apart = references_of(self._model.config, prompt).at_timestep_zero
        return [(0.0,) * len(prompt.context)] if apart else []

    @torch.inference_mode()
    def _complete(self, wanted: list[list[Timesteps]], prompts: Sequence[Prompt], shares: Sequence[slice]) -> None:
        """Has the wanted rows of each prompt in the cache. Collective where one is missing."""
        cached, missing = [self._rows.setdefault(prompt, OrderedDict()) for prompt in prompts], []
        for rows, keys in zip(cached, wanted, strict=True):
            missing.append([key for key in dict.fromkeys(keys) if key not in rows])
            for key in keys:
                if key in rows:
                    rows.move_to_end(key)
            while len(rows) + len(missing[-1]) > CACHED_ROWS:
                rows.popitem(last=False)
        if any(missing):
            for rows, keys, new in zip(cached, missing, self._compute(missing, prompts, shares), strict=True):
                rows.update(zip(keys, new, strict=True))

    def _compute(
        self, missing: list[list[Timesteps]], prompts: Sequence[Prompt], shares: Sequence[slice]
    ) -> list[list[torch.Tensor]]:
        """Computes each prompt's missing rows (images, modulation_width), of the images in `shares`. Each has its own
        memory, which goes with it. Collective."""
        inputs, made, places = [], [], []  # places: where a row begins among all that are computed, and the row
        first = 0
        for keys, prompt, images in zip(missing, prompts, shares, strict=True):
            batch = len(prompt.context)
            timesteps = torch.tensor(keys, dtype=torch.float32, device=prompt.context.device).view(len(keys), batch)
            inputs.append(self._model.modulation_input(timesteps, prompt, self._dtype).flatten(0, 1))
            shape = _count(prompt, images), self._model.modulation_width
            made.append([inputs[-1].new_empty(shape) for _ in keys])
            first_image = first + images.indices(batch)[0]
            places += [(first_image + n * batch, row) for n, row in enumerate(made[-1])]
            first += len(inputs[-1])
        active = torch.cat(inputs)
        at_once = self._at_once
        for start in range(0, len(active), at_once):
            parts = self._gather(active[start : start + at_once])
            whole = torch.cat([parts[owner, :, columns] for owner, columns in self._places], dim=-1)
            for place, row in places:
                a, b = max(start, place), min(start + at_once, place + len(row))
                if a < b:
                    row[a - place : b - place] = whole[a - start : b - start]
        return made

    def _gather(self, active: torch.Tensor) -> torch.Tensor:
        """active (n, C) -> (P, n, widest): the outputs of each rank's layers, side by side. Collective."""
        part = active.new_empty(len(active), self._widest)
        for layer, columns in self._own:
            part[:, columns] = layer(active)
        return self._exchange.all_gather(part)() if self._exchange else part[None]


def _count(prompt: Prompt, images: slice) -> int:
    return len(range(*images.indices(len(prompt.context))))
