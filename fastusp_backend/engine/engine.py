"""What a rank has from request to request: the resident model, and the meshes that it has made.

A model is loaded in stages, between which the ranks agree: `describe` reads the file's header and changes nothing,
`make_room` may fail on one rank alone, `share` and `load` may not. What was described waits in the engine, not in its
callers' variables: those live on in the traceback of a refusal, and its memory with them, after `release` has given all
back.
"""

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from msgspec.structs import replace

from .. import host_memory
from ..comm.groups import world
from ..comm.mesh import Mesh, make_mesh, single_rank_mesh
from ..comm.symmetric import meetings
from ..comm.transport import Transport
from ..config import Layout, ModelSpec, Settings
from ..kernels.fp8_product import check_fp8_products, check_fp8_sizes
from ..models.family import FamilyConfig
from ..models.placement import Placement
from ..pulse import Memory
from .checkpoint import Checkpoint
from .denoiser import Denoiser
from .patching import PatchedWeights, Patches
from .resident import Resident
from .room import LEAST_FREE, check_host_room, make_store, measure_room
from .warming import Warming

log = logging.getLogger(__name__)

CACHED_LAYOUTS = 2
"""Layouts whose buffers and graphs are cached: that of a guided step, and that of its further evaluations."""


class Engine:
    """One resident model; a request for another one replaces it. warming: libraries' start that is under way, which has
    ended before memory is counted or freed."""

    def __init__(self, device: torch.device, warming: Warming | None = None):
        self.device = device
        self._warming = warming
        self._resident: Resident | None = None
        self._described: Checkpoint | None = None  # to be loaded
        self._meshes: dict[Layout, tuple[Mesh, Transport]] = {}
        self._transport: Transport | None = None  # of the last layout
        self._placement: Placement | None = None  # of the resident model's weights
        self._rank, self._ranks = world()

    @property
    def spec(self) -> ModelSpec | None:
        """What the resident model was made from; None without one."""
        return self._resident.spec if self._resident else None

    @property
    def parked(self) -> bool:
        return self._resident is not None and self._resident.parked

    @property
    def transport(self) -> str:
        """How the ranks of the last layout exchange tokens; empty before the first."""
        return str(self._transport) if self._transport else ""

    @property
    def placement(self) -> str:
        """Where the resident model's weights lie, for people; empty without one."""
        return str(self._placement) if self._resident else ""

    @property
    def unpacked(self) -> bool:
        """Whether weights of the resident model were unpacked as they were read, all or some."""
        return self._resident is not None and self._placement.unpacked > 0

    @property
    def streams(self) -> bool:
        """Whether blocks of the resident model travel."""
        return self._resident is not None and self._resident.stream is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this rank has: on the device, or parked in host memory."""
        return self._resident.nbytes if self._resident else 0

    @property
    def patches(self) -> int | None:
        """The number of the patch set that is in the weights: 0 for none, None where it is not known."""
        return self._resident.patched.number if self._resident else None

    def is_resident(self, spec: ModelSpec) -> bool:
        """Whether the resident model is that of `spec`, parked or not. One that was not unpacked need not be read
        again to be."""
        if self._resident is None or self.unpacked:
            return self.spec == spec
        return replace(self.spec, unpack=spec.unpack) == spec

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
        self._described = None  # of a request that was refused
        if self.is_resident(spec):
            self.check_file()
            return self._resident.model.config
        if spec.linear == "fp8":
            check_fp8_products(self.device, getattr(torch, spec.compute))
        described = Checkpoint(spec, self._rank, self._ranks)
        if spec.linear == "fp8":
            check_fp8_sizes(self.device, {tuple(layer.weight.shape) for layer in described.model.products()})
        self._described = described
        return described.model.config

    def check_file(self) -> None:
        """Raises CheckpointError where the resident weights lie in a mapped file that was written to: they may be
        anything."""
        if self._resident is not None:
            self._resident.check_file()

    def make_room(self) -> None:
        """Drops the resident model, decides where the weights of the one that was described will lie, and allocates
        what lies on this rank alone. Collective. Raises RequestError, on all ranks alike, where they do not fit, and
        what torch raises."""
        described = self._described
        self.release()
        room = measure_room(self.device)
        placement = described.settle(room)
        check_host_room(placement, described.plans, room)
        if placement.slabs:
            described.stream_blocks(placement, make_store(placement, self.device), self.device)
        described.allocate(self.device, self._reading_group())
        self._described, self._placement = described, placement

    def share(self) -> None:
        """Allocates what the ranks have in common of the model's memory, behind `make_room` or `reserve`. Collective;
        raises OutOfMemoryTogether."""
        if self._described is not None:
            self._described.share()
        else:
            self._resident.share()

    def load(self) -> None:
        """Makes the described model the resident one. Collective where GPUs share the reading: an error there is a
        RuntimeError, which ends the rank, since the others wait for it. Raises CheckpointError where the file was
        written to meanwhile."""
        checkpoint, self._described = self._described, None
        try:
            checkpoint.read()
        except Exception as error:
            if self._reading_group() is None and (checkpoint.stream is None or self._ranks == 1):
                raise
            raise RuntimeError(f"reading {checkpoint.spec.path} failed when the ranks had begun: {error}") from error
        checkpoint.check_file()
        self._resident = Resident(checkpoint, PatchedWeights(checkpoint, self.drop_evaluations), self.device)

    def _reading_group(self) -> dist.ProcessGroup | None:
        return None if self.device.type == "cpu" or self._ranks == 1 else dist.group.WORLD

    def patch(self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int) -> None:
        """Changes the resident model's weights; nothing is compiled again, and captured only where the factors of
        packed weights change or a weight is widened. Raises as `PatchedWeights.change`."""
        restored, patched = self._on_device().patch(weights, tensors, base=base, number=number)
        log.info("patch set %d: %d weights restored, %d patched", number, restored, patched)

    def connect(self, layout: Layout, settings: Settings) -> None:
        """Has the ranks of a layout know each other, which `denoiser` exchanges nothing for then. Collective: a rank
        that fails here alone leaves the others waiting. Raises OutOfMemoryTogether."""
        _, transport = self.mesh(layout)
        transport.wire(settings.wire)

    def denoiser(self, layout: Layout, settings: Settings) -> Denoiser:
        """The resident model under a layout and options, with its graphs. Those of the last `CACHED_LAYOUTS` layouts
        are cached: evaluations of one prompt and of two may take turns. Other options drop them. Collective before
        `connect`.

        Raises ValueError for options this device does not have.
        """
        resident = self._on_device()
        mesh, self._transport = self.mesh(layout)
        cached, key = resident.denoisers, (layout, settings)
        if key not in cached:
            if any(options != settings for _, options in cached):
                cached.clear()
            while len(cached) >= CACHED_LAYOUTS:
                cached.popitem(last=False)
            wire = self._transport.wire(settings.wire)
            log.info("%s over %s, sending %s values", layout, self._transport, wire)
            dtype, owners = getattr(torch, resident.spec.compute), resident.checkpoint.ownership.owners
            cached[key] = Denoiser(resident.model, mesh, self._transport, settings, dtype, owners)
        cached.move_to_end(key)
        return cached[key]

    @property
    def meetings(self) -> int:
        """See comm/symmetric.py."""
        return meetings()

    @property
    def shares_memory(self) -> bool:
        """Whether buffers and graphs of several layouts are cached; the same on all ranks between requests."""
        return self._resident is not None and len(self._resident.denoisers) > 1

    @property
    def spare(self) -> int:
        """Bytes of a GPU that must be left where an evaluation's buffers are made beside those of another layout, for
        what it takes that is not counted: weights leave it for those of one."""
        return LEAST_FREE if self.shares_memory and self.device.type == "cuda" else 0

    def park(self) -> None:
        """Moves the weights to host memory, 1/P on each rank, and drops what was computed with them. Raises MemoryError
        where the host has no room."""
        if self._resident is None or self._resident.parked:
            return
        self._resident.park()
        self.drop_evaluations()

    def reserve(self) -> None:
        """Allocates what a parked model needs to come back. Raises torch.OutOfMemoryError."""
        self._resident.reserve()

    def fetch(self) -> None:
        """Brings a parked model back, after `share`. Collective."""
        self._resident.fetch()

    def drop_evaluations(self) -> None:
        """Drops buffers, graphs and what was computed of prompts; the weights stay."""
        if self._resident is not None:
            self._resident.denoisers.clear()
        self._free_caches()

    def release(self) -> None:
        """Drops the resident model and gives its memory back."""
        if self._resident is not None:
            self._resident.close()
        self._resident = self._described = None
        self._free_caches()

    def memory_report(self) -> str:
        """What this rank's memory is used for, for people to read."""
        weights = 0 if self.parked else self.nbytes
        text = f"{weights / 1e9:.1f} GB of weights"
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            rest = torch.cuda.memory_allocated(self.device) - (weights - self._mapped_bytes())
            text += f" and {rest / 1e9:.1f} GB of other tensors; {free / 1e9:.1f} of {total / 1e9:.1f} GB were free"
        return text

    def memory(self) -> Memory | None:
        """What this rank's memory is used for, for the pool to show; None where the system does not say."""
        weights = 0 if self.parked else self.nbytes
        if self.device.type == "cuda":
            own = torch.cuda.memory_reserved(self.device) + self._mapped_bytes()
            return Memory(weights, own, *torch.cuda.mem_get_info(self.device))
        own, free = host_memory.resident(), host_memory.available()
        if own is None or free is None:
            return None
        return Memory(weights, own, free, host_memory.total())

    def _mapped_bytes(self) -> int:
        """Bytes of the weights that torch's allocator does not count."""
        store = self._resident.stream.store if self.streams and not self.parked else None
        return store.nbytes + store.slot_bytes if store is not None and store.on_device else 0

    def _on_device(self) -> Resident:
        """The resident model, whose weights can be used. Raises RuntimeError where there is none."""
        if self._resident is None or self._resident.parked:
            raise RuntimeError("no model is loaded")
        return self._resident

    def _free_caches(self) -> None:
        if self._warming is not None:
            self._warming.wait()
            self._warming = None
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream on Hopper; no graph refers to them any more
            torch.cuda.empty_cache()
