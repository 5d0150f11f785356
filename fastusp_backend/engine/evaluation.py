"""Evaluations for tensors of one shape: static buffers, and on GPUs one CUDA graph of everything between them.
Two where the first block may show that the others need not be computed: then the CPU decides between the graphs.

A replay starts all kernels, and the exchanges between ranks, without Python. It finds its tensors by address, so what
goes in is copied to buffers that stay, and what comes out is overwritten by the next replay. CPU ranks, and GPUs
without `cuda_graphs`, compute the same in the same buffers.

Shapes: B batch, C latent channels, C' further input channels, h w latent height and width, p patch edge, Lt text tokens
of this rank, R reference tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..attention import JointAttention
from ..attention.local import Attend
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..comm.transport import Transport
from ..comm.wire import PACKED, WireFormat
from ..config import Settings
from ..models.family import FamilyConfig, Residuals, Stage, Transformer
from ..models.patchify import patch_grid, patchify, unpatchify
from ..models.positions import References
from ..models.segments import Segments
from ..pulse import beat
from .first_block import PromptCache
from .pace import Pace


class Shape(NamedTuple):
    """What an `Evaluation` is made for.

    x: the latents' shape (B, C, h, w).
    text: tokens of the prompt's text, over all ranks, with those that fill it up.
    references: the sizes and places of reference images.
    residuals: the shapes (B or 1, n, hidden) of a ControlNet's tensors.
    input, output: which of them is added after each block, see `models.residuals.Residuals`.
    skipped: the numbers of blocks that are left out.
    """

    x: tuple[int, ...]
    text: int
    references: References
    residuals: tuple[tuple[int, ...], ...] = ()
    input: tuple[int | None, ...] = ()
    output: tuple[int | None, ...] = ()
    skipped: tuple[int, ...] = ()


class PromptTensors(NamedTuple):
    """A prompt as an evaluation takes it.

    text: embedded text tokens of this rank, (B, Lt, hidden).
    concat: further input channels, (B, C', h, w).
    references: patches of all reference images, (B, R, p^2 C).
    """

    text: torch.Tensor
    concat: torch.Tensor | None
    references: torch.Tensor | None


def exchanged(config: FamilyConfig, dtype: torch.dtype, wire: WireFormat) -> dict:
    """What `Transport.connect` asks of a model."""
    heads = {"heads": config.heads, "dim": config.hidden // config.heads, "dtype": dtype}
    return heads | {"packed": PACKED[wire], "width": config.channels * config.patch**2}


class _Graph:
    """What was computed once while it was captured, to be computed again by `replay`."""

    def __init__(self, compute: Callable, pool):
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = compute()

    def replay(self):
        """Gives what `compute` gave, with other values."""
        self._graph.replay()
        return self._output


class Evaluation:
    """The buffers of one shape, and the graph between them. What is computed the first time compiles and allocates, so
    nothing is captured before all blocks were computed once."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        transport: Transport,
        attend: Attend,
        settings: Settings,
        segments: Segments,
        shape: Shape,
        dtype: torch.dtype,
    ):
        config, references, device = model.config, shape.references, mesh.device
        batch, channels, *size = shape.x
        self._model, self._mesh, self._segments, self._size = model, mesh, segments, size
        self._patch = patch = config.patch
        self._grid = patch_grid(*size, patch)
        self._tokens = self._grid[0] * self._grid[1]
        filled = config.filled(self._tokens + references.tokens)
        self._shards = shards = SequenceShards(mesh.layout, shape.text, filled)
        links = transport.connect(shards, batch, **exchanged(config, dtype, transport.wire(settings.wire)))
        self._gather = links.gather
        self._joint = JointAttention(
            mesh,
            attend,
            shards,
            links,
            overlap=settings.overlap,
            pipelined=settings.ring_pipeline,
            arrived=model.tokens_arrived,
            returned=model.tokens_returned,
            eps=config.qk_eps,
        )
        text, image = model.rope(shards.text, self._grid, references, device)
        self._rope = (
            tuple(shards.take_text(table, mesh.sequence_position, dim=0) for table in text),
            tuple(shards.take_image(table, mesh.sequence_position, dim=0) for table in image),
        )
        like = {"device": device, "dtype": dtype}
        self._channels = channels
        self._x = torch.empty(batch, channels + config.concat_channels, *size, **like)
        self._text = torch.empty(batch, shards.local_text, config.hidden, **like)
        self._references = torch.empty(batch, references.tokens, self._x.shape[1] * patch**2, **like)
        self._residuals = Residuals(
            tuple(torch.zeros(b, shards.local_image, hidden, **like) for b, _, hidden in shape.residuals),
            shape.input,
            shape.output,
            shape.skipped,
        )
        self._rows = torch.empty(batch, 2 if references.at_timestep_zero else 1, model.modulation_width, **like)
        self._modulations = model.split_modulations(self._rows)
        if references.at_timestep_zero:
            image = (torch.arange(shards.image, device=device) >= self._tokens).long()
            rows = image.new_zeros(shards.local_text), shards.take_image(image, mesh.sequence_position, dim=0)
            self._segments = segments.by_row(torch.cat(rows))
        self._own_tokens = shards.unpadded_image(torch.empty(self._tokens), mesh.sequence_position, dim=0).numel()
        self._captures = settings.cuda_graphs and device.type == "cuda"
        self._computed = False  # all blocks, once
        self._pace = Pace(device)
        self._whole: _Graph | None = None
        self._head: _Graph | None = None
        self._rest: _Graph | None = None

    @property
    def captured(self) -> bool:
        """Whether there is any graph."""
        return self._whole is not None or self._head is not None

    def captured_for(self, *, caches: bool) -> bool:
        """Whether all graphs of runs with a cache, or without one, are there: those are others."""
        return None not in ((self._head, self._rest) if caches else (self._whole,))

    def run(
        self,
        x: torch.Tensor,
        prompt: PromptTensors,
        modulations: Sequence[torch.Tensor],
        residuals: tuple[torch.Tensor, ...] = (),
        pool=None,
        cache: PromptCache | None = None,
    ) -> torch.Tensor:
        """Evaluates the model at x (B, C, h, w) -> velocity (B, C, h, w), valid until the next run.

        modulations: one row (B, width), or two of which references take the second.
        residuals: a ControlNet's tensors (B or 1, n, hidden) on any device, read by when the velocity is there.
        pool: the memory pool that all graphs share.
        cache: what may leave out all blocks but the first.
        """
        self._x[:, : self._channels].copy_(x)
        if prompt.concat is not None:
            self._x[:, self._channels :].copy_(prompt.concat)
        self._text.copy_(prompt.text)
        if prompt.references is not None:
            self._references.copy_(prompt.references)
        for position, row in enumerate(modulations):
            self._rows[:, position].copy_(row)
        for buffer, tensor in zip(self._residuals.tensors, residuals, strict=True):
            mine = self._shards.unpadded_image(tensor, self._mesh.sequence_position, dim=1)
            # Image by image: a part in one piece, in pinned memory, goes to a GPU without a copy or a wait of the CPU.
            for image, values in zip(buffer, mine, strict=True):
                image[: len(values)].copy_(values, non_blocking=True)
        # Else it compiles, or is captured.
        known = self.captured_for(caches=cache is not None) if self._captures else self._computed
        beat(self._pace.limit if known else self._pace.unknown)
        if self._model.stream is not None:
            self._model.stream.prime(tokens=self._mesh.layout.sequence_ranks > 1)
        measured = self._pace.measured if known else contextlib.nullcontext
        if cache is not None:
            return self._run_in_two(cache, pool, measured)
        with measured():
            if not self._captures or not self._computed:
                velocity, self._computed = self._evaluate(), True
                return velocity
            self._whole = self._whole or _Graph(self._evaluate, pool)
            return self._whole.replay()

    def _run_in_two(self, cache: PromptCache, pool, measured: Callable) -> torch.Tensor:
        """The first block, and then the others if `cache` says so."""
        replays = self._captures and self._computed
        if not replays:
            stages = self._stages()
            head = next(stages)
        else:
            if self._head is None:
                stages = self._stages()
                self._head, self._rest = (_Graph(lambda: next(stages), pool) for _ in range(2))
            head = self._head.replay()
        image = cache.skip_to(head, self._own_tokens)
        if image is not None:
            return self._whole_latents(self._model.finish(image, self._modulations, self._segments))
        with measured():
            if not replays:
                end, self._computed = next(stages), True
            else:
                end = self._rest.replay()
        cache.keep(head, end)
        return end.velocity

    def _evaluate(self) -> torch.Tensor:
        stages = self._stages()
        next(stages)  # which is not kept
        return next(stages).velocity

    def _stages(self) -> Iterator[Stage]:
        """As the model's, but at the end with the whole velocity (B, C, h, w)."""
        shards, position = self._shards, self._mesh.sequence_position
        stream = patchify(self._x, self._patch)
        if self._references.shape[1]:
            stream = torch.cat([stream, self._references], dim=1)
        patches = shards.take_image(stream, position, dim=1)
        stages = self._model.stages(
            patches, self._text, self._modulations, self._rope, self._joint, self._segments, self._residuals
        )
        yield next(stages)
        end = next(stages)
        if self._model.stream is not None:
            self._model.stream.end()
        yield end._replace(velocity=self._whole_latents(end.velocity))

    def _whole_latents(self, velocity: torch.Tensor) -> torch.Tensor:
        """This rank's patches of velocity -> that of all ranks (B, C, h, w)."""
        parts = self._gather.all_gather(velocity)() if self._gather else velocity[None]
        height, width = self._size
        image = self._shards.join_image(parts)[:, : self._tokens]
        return unpatchify(image, self._grid, self._patch)[..., :height, :width]
