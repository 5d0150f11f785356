"""The loaded model, with all that lives and dies with it."""

from collections import OrderedDict
from collections.abc import Mapping

import torch

from ..config import Layout, ModelSpec, Settings
from ..models.family import Transformer
from .block_stream import BlockStream
from .checkpoint import Checkpoint
from .denoiser import Denoiser
from .parking import HostShard, resident_bytes, tensors_of
from .patching import PatchedWeights, Patches


class Resident:
    """A model whose weights this rank has on its device, or parked in host memory.

    patched: how the weights differ from those of the checkpoint, which was read.
    parked: whether they are in host memory.
    denoisers: the model under the layouts that were asked for last, with buffers and graphs; see `Engine.denoiser`.

    Nothing that it owns may refer to it: its memory must be free when the engine lets go of it, not when Python's
    collector finds a cycle.
    """

    def __init__(self, checkpoint: Checkpoint, patched: PatchedWeights, device: torch.device):
        self.checkpoint, self.patched = checkpoint, patched
        self.parked = False
        self.denoisers: OrderedDict[tuple[Layout, Settings], Denoiser] = OrderedDict()
        self._mapped = device.type == "cpu"  # CPU ranks compute from the file's mapping
        self._host = HostShard(device)
        self._device_bytes = self._measure()

    @property
    def stream(self) -> BlockStream | None:
        """The blocks whose weights do not stay on the device."""
        return self.checkpoint.stream

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def model(self) -> Transformer:
        return self.checkpoint.model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this rank has: on the device, or parked in host memory."""
        if self.parked:
            in_host_memory = self.stream is not None and not self.stream.store.on_device
            return self._host.nbytes + (self.stream.store.nbytes if in_host_memory else 0)
        return self._device_bytes

    def check_file(self) -> None:
        """Raises CheckpointError where the weights lie in a mapped file that was written to: they may be anything."""
        if self._mapped and not self.parked:
            self.checkpoint.check_file()

    def patch(
        self, weights: Patches, tensors: Mapping[str, torch.Tensor], *, base: int | None, number: int
    ) -> tuple[int, int]:
        """Returns how many weights were restored and how many patched. Raises as `PatchedWeights.change`."""
        changed = self.patched.change(weights, tensors, base=base, number=number)
        self._device_bytes = self._measure()
        for denoiser in self.denoisers.values():
            denoiser.forget_prompts()
        return changed

    def park(self) -> None:
        """Raises MemoryError, the weights where they were, where the host has no room."""
        own = [t for layer in self.model.modulations() for t in (*layer.parameters(), *layer.buffers())]
        self._host.park(self._staying(), own, self._apart())
        if self.stream is not None:
            self.stream.leave()
        self.parked = True

    def reserve(self) -> None:
        """Allocates what the parked weights need to come back. Raises torch.OutOfMemoryError."""
        self._host.reserve()
        if self.stream is not None:
            self.stream.allocate()

    def share(self) -> None:
        """Allocates what the ranks have in common, after `reserve`. Collective; raises OutOfMemoryTogether."""
        if self.stream is not None:
            self.stream.share()

    def fetch(self) -> None:
        """Brings parked weights back, after `share`. Collective."""
        self._host.fetch(self._apart())
        if self.stream is not None:
            self.stream.meet()
        self.parked = False

    def close(self) -> None:
        """Gives the host's memory back, and what the ranks share; nothing may be asked of it afterwards."""
        self._host.close()
        if self.stream is not None:
            self.stream.free()

    def _staying(self) -> list[torch.Tensor]:
        """The tensors that are not streamed."""
        streamed = set() if self.stream is None else {id(tensor) for tensor in self.stream.tensors}
        return [tensor for tensor in tensors_of(self.model) if id(tensor) not in streamed]

    def _apart(self) -> list[torch.Tensor]:
        """This rank's parts of streamed blocks, where they lie on the device."""
        return self.stream.store.own if self.stream is not None and self.stream.store.on_device else []

    def _measure(self) -> int:
        """Bytes of the device that the weights take."""
        streamed = 0
        if self.stream is not None:
            store = self.stream.store
            streamed = store.slot_bytes + (store.nbytes if store.on_device else 0)
        return resident_bytes(self._staying()) + streamed
