"""Evaluations of a transformer over all ranks: latents in, velocity out, both whole on every rank.

What does not change from step to step is computed once: a prompt's text tokens and the patches of its references, and
its modulations (modulations.py).
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch

from ..attention.local import choose
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..comm.transport import Transport
from ..config import Settings
from ..errors import RequestError
from ..models.family import NO_RESIDUALS, Residuals, Transformer, check_control, references_of
from ..models.patchify import patch_grid, patchify
from ..models.segments import Segments
from ..prompt import Prompt
from ..pulse import USUAL_SECONDS, beat
from .step import PromptTensors, Shape, Step

KEPT_STEPS = 4
"""Shapes whose buffers and graphs are kept."""
WORKING_SET = 24
"""Values of the model's width per token of a rank that an evaluation has at a time, its buffers included."""


class Denoiser:
    """velocity = denoiser(x, modulations, conditioning), computed by all ranks that share a sequence together."""

    def __init__(self, model: Transformer, mesh: Mesh, transport: Transport, settings: Settings, dtype: torch.dtype):
        self.model, self.mesh, self.transport, self.settings, self.dtype = model, mesh, transport, settings, dtype
        _, self._attend = choose(settings.attention, mesh.device, dtype)
        self._segments = Segments(mesh.device, fused=settings.compile, fp8=settings.linear == "fp8")
        self._prompts: weakref.WeakKeyDictionary[Prompt, PromptTensors] = weakref.WeakKeyDictionary()
        self._steps: OrderedDict[tuple, Step] = OrderedDict()
        self._generation = transport.generation
        self._graph_memory: tuple[int, int] | None = None  # what all its graphs share

    def check(self, x: torch.Tensor, conditioning: Prompt, control: Residuals = NO_RESIDUALS) -> None:
        """Raises RequestError for tensors that do not fit the model."""
        self.model.check(x, conditioning)
        if problem := check_control(x, conditioning, control, self.model.config):
            raise RequestError(problem)

    @torch.inference_mode()
    def __call__(
        self,
        x: torch.Tensor,
        modulations: Sequence[torch.Tensor],
        conditioning: Prompt,
        control: Residuals = NO_RESIDUALS,
    ) -> torch.Tensor:
        """x (B, C, h, w) or (B, C, 1, h, w), modulations as `ModulationTable.rows` gives them -> velocity, as x, in the
        compute type, valid until the next call."""
        if x.dim() == 5:
            return self(x.squeeze(2), modulations, conditioning, control).unsqueeze(2)
        step = self._step(self._shape(x, conditioning, control))
        if x.is_cuda and not any(kept.captured for kept in self._steps.values()):
            # When its last graph is gone, nothing may be captured into memory of which some is still in use.
            self._graph_memory = torch.cuda.graph_pool_handle()
        return step.run(x, self._of(conditioning), modulations, control.tensors, self._graph_memory)

    def reserve(self, x: torch.Tensor, conditioning: Prompt, control: Residuals = NO_RESIDUALS) -> None:
        """Tries whether an evaluation of these shapes finds its memory, while all ranks can still refuse it together:
        within one, a rank that fails leaves the others waiting. Raises torch.OutOfMemoryError."""
        shape = self._shape(_flat(x), conditioning, control)
        step = self._steps.get(shape)
        if step is not None and step.captured:
            return
        rows, columns = patch_grid(*x.shape[-2:], self.model.config.patch)
        tokens = rows * columns + shape.references.tokens
        tokens = SequenceShards(self.mesh.layout, shape.text, tokens).local
        count = WORKING_SET * len(x) * tokens * self.model.config.hidden
        torch.empty(count, dtype=self.dtype, device=x.device)  # and free it
        if x.is_cuda and step is None:
            torch.cuda.empty_cache()  # exchanges' buffers do not come from torch's cache

    def _shape(self, x: torch.Tensor, conditioning: Prompt, control: Residuals) -> Shape:
        return Shape(
            tuple(x.shape),
            conditioning.context.shape[1],
            references_of(self.model.config, conditioning),
            tuple(tuple(tensor.shape) for tensor in control.tensors),
            control.input,
            control.output,
        )

    def forget_prompts(self) -> None:
        """Drops what was computed from prompts, after weights have changed. Buffers and graphs stay."""
        self._prompts.clear()

    def _of(self, conditioning: Prompt) -> PromptTensors:
        if conditioning not in self._prompts:
            beat(USUAL_SECONDS)
            context, concat = conditioning.context, conditioning.concat
            shards = SequenceShards(self.mesh.layout, context.shape[1], 0)
            local = shards.take_text(context.to(self.dtype), self.mesh.sequence_position, dim=1)
            patch = self.model.config.patch
            patches = [patchify(_flat(latent).to(self.dtype), patch) for latent in conditioning.references]
            self._prompts[conditioning] = PromptTensors(
                self.model.embed_text(local),
                None if concat is None else _flat(concat).to(self.dtype),
                torch.cat(patches, dim=1) if patches else None,
            )
        return self._prompts[conditioning]

    def _step(self, shape: Shape) -> Step:
        if self.transport.generation != self._generation:
            self._steps.clear()  # their graphs hold addresses that have moved
            self._generation = self.transport.generation
        if shape not in self._steps:
            beat(USUAL_SECONDS)
            while len(self._steps) >= KEPT_STEPS:
                self._steps.popitem(last=False)
            self._steps[shape] = Step(
                self.model,
                self.mesh,
                self.transport,
                self._attend,
                self.settings,
                self._segments,
                shape,
                self.mesh.device,
                self.dtype,
            )
            if self.transport.generation != self._generation:
                self._steps = OrderedDict({shape: self._steps[shape]})
                self._generation = self.transport.generation
        self._steps.move_to_end(shape)
        return self._steps[shape]


def _flat(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) of latents that may have a frame axis of one."""
    return latents.squeeze(2) if latents.dim() == 5 else latents
