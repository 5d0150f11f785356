"""One evaluation for tensors of one shape: static buffers, and on GPUs one CUDA graph of everything between them."""

import torch

from ..attention import JointAttention
from ..attention.local import Attend
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..comm.transport import Transport
from ..config import Settings
from ..models.family import Transformer
from ..models.patches import PATCH, patch_grid, patchify, unpatchify
from ..models.segments import Segments


class Step:
    """run(x, text, modulations) for x (B, C, h, w), text (B, Lt, hidden), modulations (B, width), all copied into
    buffers that stay where they are. The first run is not captured (it compiles and allocates), the second one is."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        transport: Transport,
        attend: Attend,
        settings: Settings,
        segments: Segments,
        x: torch.Tensor,
        shards: SequenceShards,
        dtype: torch.dtype,
    ):
        config, batch = model.config, x.shape[0]
        self._model, self._mesh, self._segments, self._shards = model, mesh, segments, shards
        links = transport.connect(
            shards,
            batch,
            config.heads,
            config.hidden // config.heads,
            dtype,
            packed=settings.wire == "fp8",
            width=config.channels * PATCH**2,
        )
        self._gather = links.gather
        self._joint = JointAttention(
            mesh, attend, shards, links, overlap=settings.overlap, pipelined=settings.ring_pipeline
        )
        self._size = x.shape[-2:]
        self._grid = patch_grid(*self._size)
        text, image = model.rope(shards.text, self._grid, x.device)
        self._rope = (
            tuple(shards.take_text(table, mesh.rank, dim=0) for table in text),
            tuple(shards.take_image(table, mesh.rank, dim=0) for table in image),
        )
        self._x = x.new_empty(x.shape, dtype=dtype)
        self._text = x.new_empty(batch, shards.local_text, config.hidden, dtype=dtype)
        self._row = x.new_empty(batch, model.modulation_width, dtype=dtype)
        self._modulations = model.split_modulations(self._row)
        self._captures = settings.cuda_graphs and x.is_cuda
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self, x: torch.Tensor, text: torch.Tensor, modulations: torch.Tensor, pool=None) -> torch.Tensor:
        """-> velocity (B, C, h, w), valid until the next run. pool: the memory pool that all graphs share."""
        self._x.copy_(x)
        self._text.copy_(text)
        self._row.copy_(modulations)
        self._runs += 1
        if not self._captures or self._runs == 1:
            return self._evaluate()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._output = self._evaluate()
            self._graph = graph
        self._graph.replay()
        return self._output

    def _evaluate(self) -> torch.Tensor:
        shards, rank = self._shards, self._mesh.rank
        patches = shards.take_image(patchify(self._x), rank, dim=1)
        velocity = self._model(patches, self._text, self._modulations, self._rope, self._joint, self._segments)
        parts = self._gather.all_gather(velocity)() if self._gather else velocity[None]
        height, width = self._size
        return unpatchify(shards.join_image(parts), self._grid)[..., :height, :width]
