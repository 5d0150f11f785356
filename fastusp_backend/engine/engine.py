"""What a rank keeps between requests: the resident model, the meshes it has made, and its compiled evaluations."""

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..comm.groups import world
from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..comm.transport import Transport
from ..config import Layout, ModelSpec, Settings
from ..kernels.fp8_product import check_fp8_products, check_fp8_sizes
from ..models.family import FamilyConfig, Transformer
from .batch import BatchedDenoiser
from .denoiser import Denoiser
from .loading import Checkpoint
from .parking import HostShare, held_bytes
from .patching import PatchedWeights, Patches

log = logging.getLogger(__name__)


class Engine:
    """One resident model; a request for another one replaces it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spec: ModelSpec | None = None
        self._model: Transformer | None = None
        self._weights: PatchedWeights | None = None
        self._mapped: Checkpoint | None = None
        self._resident_bytes = 0
        self._described: Checkpoint | None = None
        self._meshes: dict[Layout, tuple[Mesh, Transport]] = {}
        self._denoiser: tuple[Layout, Settings, BatchedDenoiser] | None = None
        self._transport: Transport | None = None  # of the last layout
        self._rank, self._ranks = world()
        self._owners: list[int] = []  # of the resident model's modulations
        self._share = HostShare(device)
        self._parked = False

    @property
    def spec(self) -> ModelSpec | None:
        """The resident model, parked or not."""
        return self._spec

    @property
    def parked(self) -> bool:
        return self._parked

    @property
    def exchanges(self) -> str:
        """How the ranks of the last layout exchange tokens; empty before the first."""
        return str(self._transport) if self._transport else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this rank has: on the device, or parked in host memory."""
        if self._model is None:
            return 0
        return self._share.nbytes if self._parked else self._resident_bytes

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
        return self._meshes[layout]

    def describe(self, spec: ModelSpec) -> FamilyConfig:
        """What the model of `spec` is, by its file's header alone. Raises CheckpointError, as `check_file` too, or
        ValueError for products that this device does not have; nothing has changed then."""
        if self.holds(spec):
            self.check_file()
            return self._model.config
        if spec.linear == "fp8":
            check_fp8_products(self.device, getattr(torch, spec.compute))
        described = Checkpoint(spec, self._rank, self._ranks)
        if spec.linear == "fp8":
            check_fp8_sizes(self.device, {tuple(layer.weight.shape) for layer in described.model.products()})
        self._described = described
        return self._described.model.config

    def check_file(self) -> None:
        """Raises CheckpointError where the resident weights lie in a mapped file that was written to: they may be
        anything."""
        if self._mapped is not None and not self._parked:
            self._mapped.check_file()

    def make_room(self) -> None:
        """Drops the resident model and makes room for the one that was described."""
        described = self._described
        self.release()
        described.allocate(self.device, self._reading_group())
        self._described = described

    def load(self) -> None:
        """Makes the described model the resident one. Collective where GPUs share the reading: an error there is a
        RuntimeError, which ends the rank, since the others wait for it. Raises CheckpointError where the file was
        written to meanwhile."""
        checkpoint, self._described = self._described, None
        try:
            model = checkpoint.read()
        except Exception as error:
            if self._reading_group() is None:
                raise
            raise RuntimeError(f"reading {checkpoint.spec.path} failed when the ranks had begun: {error}") from error
        checkpoint.check_file()
        self._mapped = checkpoint if self.device.type == "cpu" else None
        self._model, self._spec = model, checkpoint.spec
        self._weights = PatchedWeights(checkpoint, self.drop_evaluations)
        self._owners = checkpoint.holding.owners
        self._resident_bytes = held_bytes(self._model)

    def _reading_group(self) -> dist.ProcessGroup | None:
        return None if self.device.type == "cpu" or self._ranks == 1 else dist.group.WORLD

    def patch(self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int) -> None:
        """Changes the resident model's weights; nothing is compiled again, and captured only where the factors of
        packed weights change or a weight is widened. Raises as `PatchedWeights.change`."""
        if self._weights is None or self._parked:
            raise RuntimeError("no model is loaded")
        restored, patched = self._weights.change(weights, tensors, base=base, number=number)
        self._resident_bytes = held_bytes(self._model)
        log.info("patch set %d: %d weights restored, %d patched", number, restored, patched)
        if self._denoiser is not None:
            self._denoiser[2].forget_prompts()

    def connect(self, layout: Layout, settings: Settings) -> None:
        """Has the ranks of a layout know each other, which `denoiser` exchanges nothing for then. Collective: a rank
        that fails here alone leaves the others waiting. Raises OutOfMemoryTogether."""
        _, transport = self.mesh(layout)
        transport.wire(settings.wire)

    def denoiser(self, layout: Layout, settings: Settings) -> BatchedDenoiser:
        """The resident model under a layout and options; the last one asked for is kept, with its graphs. Collective
        before `connect`.

        Raises ValueError for options this device does not have.
        """
        if self._model is None or self._spec is None or self._parked:
            raise RuntimeError("no model is loaded")
        if self._denoiser is None or self._denoiser[:2] != (layout, settings):
            self._denoiser = None
            mesh, transport = self.mesh(layout)
            self._transport = transport
            wire = transport.wire(settings.wire)
            log.info("%s over %s, sending %s values", layout, transport, wire)
            dtype = getattr(torch, self._spec.compute)
            denoiser = Denoiser(self._model, mesh, transport, settings, dtype)
            self._denoiser = layout, settings, BatchedDenoiser(denoiser, self._owners)
        return self._denoiser[2]

    def park(self) -> None:
        """Moves the weights to host memory, 1/P on each rank, and drops what was computed with them. Raises MemoryError
        where the host has no room."""
        if self._model is None or self._parked:
            return
        own = [t for layer in self._model.modulations() for t in (*layer.parameters(), *layer.buffers())]
        self._share.park(self._model, own)
        self._parked = True
        self.drop_evaluations()

    def reserve(self) -> None:
        """Allocates what a parked model needs to come back. Raises torch.OutOfMemoryError."""
        self._share.reserve()

    def fetch(self) -> None:
        """Brings a parked model back, after `reserve`. Collective."""
        self._share.fetch()
        self._parked = False

    def drop_evaluations(self) -> None:
        """Drops buffers, graphs and what was computed of prompts; the weights stay."""
        self._denoiser = None
        self._give_back()

    def release(self) -> None:
        """Drops the resident model and gives its memory back."""
        self._spec = self._model = self._denoiser = None
        self._weights = self._mapped = self._described = None
        self._parked = False
        self._share.close()
        self._give_back()

    def held(self) -> str:
        """What this rank's memory holds, for people to read."""
        weights = 0 if self._model is None or self._parked else self._resident_bytes
        text = f"{weights / 1e9:.1f} GB of weights"
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            rest = torch.cuda.memory_allocated(self.device) - weights
            text += f" and {rest / 1e9:.1f} GB of other tensors; {free / 1e9:.1f} of {total / 1e9:.1f} GB were free"
        return text

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream on Hopper; no graph refers to them any more
            torch.cuda.empty_cache()
