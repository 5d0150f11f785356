"""What a rank keeps between requests: the resident model, the meshes it has made, and its compiled evaluations."""

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..comm.transport import Transport
from ..config import Layout, ModelSpec, Settings
from ..models.family import Config, Transformer
from ..models.loading import Checkpoint
from ..models.patching import PatchedWeights, Patches
from ..models.products import check_fp8_products
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
        self._described: Checkpoint | None = None
        self._meshes: dict[Layout, tuple[Mesh, Transport]] = {}
        self._denoiser: tuple[Layout, Settings, BatchedDenoiser] | None = None

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
            log.info("layout %s: Ulysses over %s", layout, self._meshes[layout][1].kind)
        return self._meshes[layout]

    def describe(self, spec: ModelSpec) -> Config:
        """What the model of `spec` is, by its file's header alone. Raises CheckpointError, or ValueError for products
        that this device does not have; nothing has changed then."""
        if self.holds(spec):
            return self._model.config
        if spec.linear == "fp8":
            check_fp8_products(self.device, getattr(torch, spec.compute))
        self._described = Checkpoint(spec)
        return self._described.model.config

    def make_room(self) -> None:
        """Drops the resident model and makes room for the one that was described."""
        described = self._described
        self.release()
        described.allocate(self.device, self._reading_group())
        self._described = described

    def load(self) -> None:
        """Makes the described model the resident one. Collective where GPUs share the reading: an error there is a
        RuntimeError, which ends the rank, since the others wait for it."""
        checkpoint, self._described = self._described, None
        try:
            self._model = checkpoint.read()
        except Exception as error:
            if self._reading_group() is None:
                raise
            raise RuntimeError(f"reading {checkpoint.spec.path} failed when the ranks had begun: {error}") from error
        self._spec, self._weights = checkpoint.spec, PatchedWeights(checkpoint)

    def _reading_group(self) -> dist.ProcessGroup | None:
        if self.device.type == "cpu" or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return dist.group.WORLD

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
        self._spec = self._model = self._denoiser = None
        self._weights = self._described = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
