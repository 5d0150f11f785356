"""Evaluations of a transformer over all ranks: latents in, velocity out, both whole on every rank.

What does not change from step to step is computed once: a prompt's text tokens, and the modulations of all its
timesteps.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch

from ..attention.local import choose
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..comm.transport import Transport
from ..config import Settings
from ..models.family import Conditioning, Transformer
from ..models.patches import patch_grid
from ..models.segments import Segments
from .step import Step

KEPT_STEPS = 4
"""Shapes whose buffers and graphs are kept."""
KEPT_ROWS = 64
"""Modulation rows kept per prompt: 2.1 MB each for FLUX.1, 4.4 for Qwen-Image in bf16, batch 1."""


@dataclass(slots=True)
class _Computed:
    text: torch.Tensor
    rows: OrderedDict[tuple[float, ...], torch.Tensor]


class Denoiser:
    """velocity = denoiser(x, timestep, conditioning), computed by all ranks of the mesh together."""

    def __init__(self, model: Transformer, mesh: Mesh, transport: Transport, settings: Settings, dtype: torch.dtype):
        self.model, self.mesh, self.transport, self.settings, self.dtype = model, mesh, transport, settings, dtype
        _, self._attend = choose(settings.attention, mesh.device, dtype)
        self._segments = Segments(compiled=settings.compile and mesh.device.type == "cuda")
        self._computed: weakref.WeakKeyDictionary[Conditioning, _Computed] = weakref.WeakKeyDictionary()
        self._steps: OrderedDict[tuple, Step] = OrderedDict()
        self._generation = transport.generation
        self._graph_memory = torch.cuda.graph_pool_handle() if mesh.device.type == "cuda" else None

    @torch.inference_mode()
    def prepare(self, timesteps: list[float], conditioning: Conditioning) -> None:
        """Computes the modulations of these timesteps in one product per layer."""
        batch = conditioning.context.shape[0]
        keys = [(t,) * batch for t in list(dict.fromkeys(timesteps))[:KEPT_ROWS]]  # later ones when they are needed
        self._add_rows(self._of(conditioning), conditioning, keys)

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """x (B, C, h, w) or (B, C, 1, h, w), timestep (B,) in [0, 1] on the CPU -> velocity, as x, in the compute type,
        valid until the next call."""
        if x.dim() == 5:
            return self(x.squeeze(2), timestep, conditioning).unsqueeze(2)
        computed = self._of(conditioning)
        key = tuple(timestep.tolist())
        if key not in computed.rows:
            self._add_rows(computed, conditioning, [key])
        computed.rows.move_to_end(key)
        step = self._step(x, conditioning.context.shape[1])
        return step.run(x, computed.text, computed.rows[key], self._graph_memory)

    def forget_prompts(self) -> None:
        """Drops what was computed from prompts, after weights have changed. Buffers and graphs stay."""
        self._computed.clear()

    def _of(self, conditioning: Conditioning) -> _Computed:
        if conditioning not in self._computed:
            context = conditioning.context
            shards = SequenceShards(self.mesh.layout, context.shape[1], 0)
            local = shards.take_text(context.to(self.dtype), self.mesh.rank, dim=1)
            self._computed[conditioning] = _Computed(self.model.embed_text(local), OrderedDict())
        return self._computed[conditioning]

    def _add_rows(self, computed: _Computed, conditioning: Conditioning, keys: list[tuple[float, ...]]) -> None:
        missing = [key for key in dict.fromkeys(keys) if key not in computed.rows]
        if not missing:
            return
        device = conditioning.context.device
        timesteps = torch.tensor(missing, dtype=torch.float32, device=device)
        table = self.model.modulation_table(timesteps, conditioning, self.dtype)
        computed.rows.update(zip(missing, table, strict=True))
        while len(computed.rows) > KEPT_ROWS:
            computed.rows.popitem(last=False)

    def _step(self, x: torch.Tensor, text: int) -> Step:
        if self.transport.generation != self._generation:
            self._steps.clear()  # their graphs hold addresses that have moved
            self._generation = self.transport.generation
        key = (*x.shape, text)
        if key not in self._steps:
            rows, columns = patch_grid(*x.shape[-2:])
            shards = SequenceShards(self.mesh.layout, text, rows * columns)
            while len(self._steps) >= KEPT_STEPS:
                self._steps.popitem(last=False)
            self._steps[key] = Step(
                self.model,
                self.mesh,
                self.transport,
                self._attend,
                self.settings,
                self._segments,
                x,
                shards,
                self.dtype,
            )
            if self.transport.generation != self._generation:
                self._steps = OrderedDict({key: self._steps[key]})
                self._generation = self.transport.generation
        self._steps.move_to_end(key)
        return self._steps[key]
