"""What a rank keeps between requests: the resident model, the meshes it has made, and its compiled evaluations."""

import logging

import torch

from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..comm.transport import Transport
from ..config import Layout, ModelSpec, Settings
from ..models.family import Transformer
from ..models.loading import describe_model, read_weights
from .batch import BatchedDenoiser
from .denoiser import Denoiser

log = logging.getLogger(__name__)


class Engine:
    """One resident model; a request for another one replaces it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spec: ModelSpec | None = None
        self._model: Transformer | None = None
        self._meshes: dict[Layout, tuple[Mesh, Transport]] = {}
        self._denoiser: tuple[Layout, Settings, BatchedDenoiser] | None = None

    @property
    def heads(self) -> int:
        """Attention heads of the resident model."""
        if self._model is None:
            raise RuntimeError("no model is loaded")
        return self._model.config.heads

    def holds(self, spec: ModelSpec) -> bool:
        return self._spec == spec

    def mesh(self, layout: Layout) -> tuple[Mesh, Transport]:
        """Collective: all ranks ask for the same layout."""
        if layout not in self._meshes:
            single = layout.ranks == 1
            mesh = single_rank_mesh(self.device) if single else make_mesh(layout, self.device)
            self._meshes[layout] = mesh, Transport(mesh)
            log.info("layout %s: Ulysses over %s", layout, self._meshes[layout][1].kind)
        return self._meshes[layout]

    def load(self, spec: ModelSpec) -> None:
        """Makes `spec` the resident model. Raises CheckpointError; a file that is refused by its header leaves the old
        model in place."""
        if self.holds(spec):
            return
        model, keys = describe_model(spec)
        self.release()
        self._model = read_weights(model, keys, spec, self.device)
        self._spec = spec

    def denoiser(self, layout: Layout, settings: Settings) -> BatchedDenoiser:
        """The resident model under a layout and options; the last one asked for is kept, with its graphs.

        Raises ValueError for options this device does not have.
        """
        if self._model is None or self._spec is None:
            raise RuntimeError("no model is loaded")
        if self._denoiser is None or self._denoiser[:2] != (layout, settings):
            self._denoiser = None
            mesh, transport = self.mesh(layout)
            dtype = getattr(torch, self._spec.compute)
            denoiser = Denoiser(self._model, mesh, transport, settings, dtype)
            self._denoiser = layout, settings, BatchedDenoiser(denoiser)
        return self._denoiser[2]

    def release(self) -> None:
        """Drops the resident model and gives its memory back."""
        self._spec = self._model = self._denoiser = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
