"""The modulations (adaLN outputs) of a prompt's evaluations: computed once each, on all ranks, and kept.

Their layers' weights are spread over all ranks (models/holding.py): each rank computes its own layers' outputs for all
prompts of a request, an all-gather brings the others'. A rank that is alone in it would wait for ever. So what is
missing must be the same on all ranks, also where each keeps but the rows of its own prompts or images: rows are asked
for with the whole request, and are known by its prompts' places and whole batches' timesteps.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..comm.exchange import GroupExchange, world
from ..models.family import Conditioning, Transformer, references_of

KEPT_ROWS = 64
"""Evaluations whose modulations are kept per prompt: 2.1 MB each for FLUX.1, 0.2 for FLUX.2, 4.4 for Qwen-Image in
bf16, batch 1."""
AT_ONCE = 64
"""Rows, each for one image, that are computed and gathered at a time: 135 and 280 MB."""

Timesteps = tuple[float, ...]
"""Of a batch's images."""

Rows = OrderedDict[Timesteps, torch.Tensor]
"""(images, modulation_width) each; used last, dropped last."""


class ModulationTable:
    """Rows of modulations by prompt and timesteps.

    owners: the rank that holds each of `model.modulations()`; None where this one holds all of them. Methods take all
    prompts of a request, and of each the images whose rows this rank keeps, always the same of a prompt at its place
    (of another group's prompt, none).
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, owners: Sequence[int] | None):
        layers, (rank, ranks) = model.modulations(), world() if owners else (0, 1)
        self._model, self._dtype = model, dtype
        self._exchange = GroupExchange(dist.group.WORLD) if ranks > 1 else None
        widths = [0] * ranks
        self._places: list[tuple[int, slice]] = []  # of each layer: its owner, and where in that rank's part
        for layer, owner in zip(layers, owners or [0] * len(layers), strict=True):
            start, widths[owner] = widths[owner], widths[owner] + len(layer.weight)
            self._places.append((owner, slice(start, widths[owner])))
        self._own = [(layer, c) for layer, (owner, c) in zip(layers, self._places, strict=True) if owner == rank]
        self._widest, self._ranks = max(widths), ranks
        self._kept: weakref.WeakKeyDictionary[Conditioning, dict[tuple[int, int], Rows]] = weakref.WeakKeyDictionary()

    def prepare(self, timesteps: list[float], prompts: Sequence[Conditioning], mine: Sequence[slice]) -> None:
        """Computes the rows of these timesteps. Collective over all ranks."""
        whole = [[(t,) * len(prompt.context) for t in timesteps] for prompt in prompts]
        wanted = [dict.fromkeys(self._zero(prompt) + keys) for prompt, keys in zip(prompts, whole, strict=True)]
        self._add([list(keys)[:KEPT_ROWS] for keys in wanted], prompts, mine)  # later ones when they are needed

    def rows(
        self, timesteps: Timesteps, prompts: Sequence[Conditioning], mine: Sequence[slice]
    ) -> list[list[torch.Tensor]]:
        """Of each prompt the row (images, modulation_width) at these timesteps and, where its references have one of
        their own, that. Collective over all ranks where one is missing."""
        wanted = [[timesteps, *self._zero(prompt)] for prompt in prompts]
        self._add(wanted, prompts, mine)
        return [[rows[key] for key in keys] for rows, keys in zip(self._rows_of(prompts), wanted, strict=True)]

    def reserve(self, evaluations: int, prompts: Sequence[Conditioning], mine: Sequence[slice]) -> torch.Tensor:
        """Tries whether the rows of so many evaluations find their memory; what is returned stands for those that are
        kept. Raises torch.OutOfMemoryError."""
        counts = [min(evaluations + len(self._zero(prompt)), KEPT_ROWS) for prompt in prompts]
        kept = sum(n * _count(prompt, images) for n, prompt, images in zip(counts, prompts, mine, strict=True))
        rows = sum(n * len(prompt.context) for n, prompt in zip(counts, prompts, strict=True))
        like = {"dtype": self._dtype, "device": prompts[0].context.device}
        table = torch.empty(kept * self._model.modulation_width, **like)
        torch.empty(min(rows, AT_ONCE) * self._widest * (1 + self._ranks), **like)  # and free it
        return table

    def forget(self) -> None:
        """Drops all rows."""
        self._kept.clear()

    def _zero(self, prompt: Conditioning) -> list[Timesteps]:
        """What references of a prompt that are modulated as at timestep 0 take beside the image's."""
        apart = references_of(self._model.config, prompt).at_timestep_zero
        return [(0.0,) * len(prompt.context)] if apart else []

    def _rows_of(self, prompts: Sequence[Conditioning]) -> list[Rows]:
        """What is kept of each; by its place too, which says whose group keeps what."""
        places = [(place, len(prompts)) for place in range(len(prompts))]
        return [
            self._kept.setdefault(prompt, {}).setdefault(place, OrderedDict())
            for prompt, place in zip(prompts, places, strict=True)
        ]

    @torch.inference_mode()
    def _add(self, wanted: list[list[Timesteps]], prompts: Sequence[Conditioning], mine: Sequence[slice]) -> None:
        kept, missing = self._rows_of(prompts), []
        for rows, keys in zip(kept, wanted, strict=True):
            missing.append([key for key in dict.fromkeys(keys) if key not in rows])
            for key in keys:
                if key in rows:
                    rows.move_to_end(key)
        if not any(missing):
            return
        tables = self._compute(missing, prompts, mine)
        for rows, keys, table in zip(kept, missing, tables, strict=True):
            rows.update(zip(keys, table.unbind(1), strict=True))
            while len(rows) > KEPT_ROWS:
                rows.popitem(last=False)

    def _compute(
        self, missing: list[list[Timesteps]], prompts: Sequence[Conditioning], mine: Sequence[slice]
    ) -> list[torch.Tensor]:
        """Of each prompt, the table (images, timesteps, modulation_width) of `mine`. In order of prompts, images,
        timesteps, the rows that a rank keeps of a prompt follow each other."""
        inputs, ranges, tables = [], [], []
        first = 0
        for keys, prompt, images in zip(missing, prompts, mine, strict=True):
            timesteps = torch.tensor(keys, dtype=torch.float32, device=prompt.context.device)
            timesteps = timesteps.view(len(keys), len(prompt.context))
            inputs.append(self._model.modulation_input(timesteps, prompt, self._dtype).transpose(0, 1).flatten(0, 1))
            start, stop, _ = images.indices(len(prompt.context))
            ranges.append(range(first + start * len(keys), first + stop * len(keys)))
            tables.append(inputs[-1].new_empty(len(ranges[-1]), self._model.modulation_width))
            first += len(inputs[-1])
        active = torch.cat(inputs)
        for start in range(0, len(active), AT_ONCE):
            parts = self._gather(active[start : start + AT_ONCE])
            for own, table in zip(ranges, tables, strict=True):
                a, b = max(start, own.start), min(start + AT_ONCE, own.stop)
                if a < b:
                    pieces = [parts[owner, a - start : b - start, columns] for owner, columns in self._places]
                    torch.cat(pieces, dim=-1, out=table[a - own.start : b - own.start])
        return [
            table.view(_count(prompt, images), len(keys), self._model.modulation_width)
            for table, prompt, images, keys in zip(tables, prompts, mine, missing, strict=True)
        ]

    def _gather(self, active: torch.Tensor) -> torch.Tensor:
        """active (n, C) -> (P, n, widest): of each rank, its layers' outputs, side by side."""
        part = active.new_empty(len(active), self._widest)
        for layer, columns in self._own:
            part[:, columns] = layer(active)
        return self._exchange.all_gather(part)() if self._exchange else part[None]


def _count(prompt: Conditioning, images: slice) -> int:
    return len(range(*images.indices(len(prompt.context))))
