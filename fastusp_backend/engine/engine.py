"""What a rank keeps between requests: the resident model, the meshes it has made, and its compiled evaluations."""

import logging
from collections.abc import Mapping

import torch

from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..comm.transport import Transport
from ..config import Layout, ModelSpec, Settings
from ..models.family import Transformer
from ..models.loading import describe_model, read_weights
from ..models.patching import PatchedWeights, Patches
from .batch import BatchedDenoiser
from .denoiser import Denoiser

log = logging.getLogger(__name__)


class Engine:
    """One resident model; a request for another one replaces it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spec: ModelSpec | None = None
        self._model: Transformer | None = None
        self._weights: PatchedWeights | None = None
        self._meshes: dict[Layout, tuple[Mesh, Transport]] = {}
        self._denoiser: tuple[Layout, Settings, BatchedDenoiser] | None = None

    @property
    def heads(self) -> int:
        """Attention heads of the resident model."""
        if self._model is None:
            raise RuntimeError("no model is loaded")
        return self._model.config.heads

    @property
    def patches(self) -> int | None:
        """The number of the patch set that the weights hold: 0 for none, None where it is not known."""
        return self._weights.number if self._weights is not None else None

    def holds(self, spec: ModelSpec) -> bool:
        return self._spec == spec

    def mesh(self, layout: Layout) -> tuple[Mesh, Transport]:
        """Collective: all ranks ask for the same layout."""
        if layout not in self._meshes:
            single = layout.ranks == 1
            mesh = single_rank_mesh(self.device) if single else make_mesh(layout, self.device)
            self._meshes[layout] = mesh, Transport(mesh)
            log.info("layout %s: Ulysses over %s", layout, self._meshes[layout][1].name)
        return self._meshes[layout]

    def load(self, spec: ModelSpec) -> None:
        """Makes `spec` the resident model. Raises CheckpointError; a file that is refused by its header leaves the old
        model in place."""
        if self.holds(spec):
            return
        model, keys = describe_model(spec)
        self.release()
        self._model = read_weights(model, keys, spec, self.device)
        self._weights = PatchedWeights(self._model, keys, spec)
        self._spec = spec

    def patch(self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int) -> None:
        """Changes the resident model's weights in place; nothing is captured or compiled again. Raises as
        `PatchedWeights.change`."""
        if self._weights is None:
            raise RuntimeError("no model is loaded")
        restored, patched = self._weights.change(weights, tensors, base=base, number=number)
        log.info("patch set %d: %d weights restored, %d patched", number, restored, patched)
        if self._denoiser is not None:
            self._denoiser[2].denoiser.forget_prompts()

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
        self._spec = self._model = self._weights = self._denoiser = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
