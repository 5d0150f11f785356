"""What a rank keeps between requests: the resident model and the meshes it has made."""

import torch

from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..config import Layout, ModelSpec, Settings
from ..models.flux import Flux
from ..models.loading import load_model
from .denoiser import Denoiser


class Engine:
    """One resident model; a request for another one replaces it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spec: ModelSpec | None = None
        self._model: Flux | None = None
        self._meshes: dict[Layout, Mesh] = {}

    @property
    def heads(self) -> int:
        """Attention heads of the resident model."""
        if self._model is None:
            raise RuntimeError("no model is loaded")
        return self._model.config.heads

    def holds(self, spec: ModelSpec) -> bool:
        return self._spec == spec

    def mesh(self, layout: Layout) -> Mesh:
        """Collective: all ranks ask for the same layout."""
        if layout not in self._meshes:
            single = layout.ranks == 1
            self._meshes[layout] = single_rank_mesh(self.device) if single else make_mesh(layout, self.device)
        return self._meshes[layout]

    def load(self, spec: ModelSpec) -> None:
        """Makes `spec` the resident model. Raises CheckpointError; then none is resident."""
        if self.holds(spec):
            return
        self.release()
        self._model = load_model(spec, self.device)
        self._spec = spec

    def denoiser(self, layout: Layout, settings: Settings) -> Denoiser:
        """The resident model under a layout and options. Raises ValueError for options this device does not have."""
        if self._model is None or self._spec is None:
            raise RuntimeError("no model is loaded")
        return Denoiser(self._model, self.mesh(layout), settings, getattr(torch, self._spec.compute))

    def release(self) -> None:
        """Drops the resident model and gives its memory back."""
        self._spec = self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
