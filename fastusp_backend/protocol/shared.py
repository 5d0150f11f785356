"""Tensors in anonymous shared memory: it has no name that could outlive a killed process, and goes with its last user.

Fresh memory costs more than what is copied into it: the system clears each page before it is first written. So a
sender may keep it, and write the next request's tensors where the last one's were.
"""

import fcntl
import logging
import math
import os
import weakref
from typing import Annotated, Literal

import msgspec
import safetensors.torch
import torch

from ..errors import ProtocolError, RequestError
from ..pinning import pin, unpin

log = logging.getLogger(__name__)

_TYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_TYPES += ("int64", "int32", "int16", "int8", "uint8", "bool")
_ALIGNMENT = 256

ADVICE = "close other programs, or where too many files are open, raise `ulimit -n` before ComfyUI starts"


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a tensor lies: `offset` bytes from the memory's start."""

    dtype: Literal[_TYPES]
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    offset: Annotated[int, msgspec.Meta(ge=0)]


Places = dict[str, Place]


def inline_tensors(blob: bytes) -> dict[str, torch.Tensor]:
    """What `safetensors.torch.save` made bytes of, in memory of torch's own: as it lies, it is aligned by chance, and
    a product over it may sum otherwise the next time. Raises SafetensorError."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load(blob).items()}


class SharedTensors(dict[str, torch.Tensor]):
    """Tensors in `memory`, where others find them by `places`."""

    def __init__(self, memory: "SharedMemory", places: Places):
        super().__init__({name: memory.tensor(place) for name, place in places.items()})
        self.memory, self.places = memory, places


class SharedMemory:
    """Anonymous memory, mapped; tensors in it keep the mapping alive.

    lasting: its sender writes to it again, once what lies in it was read. Other memory is written once, and what
    receivers write to it stays their own.
    """

    def __init__(self, fd: int, *, lasting: bool):
        """Maps what a descriptor stands for. Raises ProtocolError where that is no memory, or not sealed against being
        cut short under the feet of those who map it, or where this process cannot map it."""
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("a frame's shared memory is not sealed")
        except OSError as error:
            raise ProtocolError(f"a frame's descriptor is no shared memory: {error}") from error
        size = os.fstat(fd).st_size
        if not size:
            raise ProtocolError("a frame's shared memory is empty")
        self.lasting = lasting
        try:
            self.bytes = torch.from_file(f"/proc/self/fd/{fd}", shared=lasting, size=size, dtype=torch.uint8)
            self.fd = os.dup(fd)
        except (OSError, RuntimeError) as error:
            raise ProtocolError(f"{size / 1e6:.1f} MB of shared memory cannot be mapped: {error}; {ADVICE}") from error
        weakref.finalize(self, os.close, self.fd)
        self._pinned: weakref.finalize | None = None

    @classmethod
    def made(cls, size: int) -> "SharedMemory":
        """New memory of `size` bytes, to write to. Raises RequestError where this process gets none: OSError would mean
        that the other end of a channel is gone."""
        try:
            fd = os.memfd_create("fastusp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                return cls(fd, lasting=True)
            finally:
                os.close(fd)
        except OSError as error:
            raise RequestError(
                f"{size / 1e6:.1f} MB of shared memory for a request's tensors cannot be allocated: {error}; {ADVICE}"
            ) from error
        except ProtocolError as error:
            raise RequestError(str(error)) from error

    def put(self, tensors: dict[str, torch.Tensor]) -> Places:
        """Writes tensors of any device; see `room_for`."""
        places, end = {}, 0
        for name, t in tensors.items():
            places[name] = Place(_type_name(name, t), tuple(t.shape), end)
            self.tensor(places[name]).copy_(t, non_blocking=True)
            end = _aligned(end + t.nbytes)
        for device in {t.device for t in tensors.values() if t.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return places

    def tensor(self, place: Place) -> torch.Tensor:
        """Raises ProtocolError for one that does not lie within the memory."""
        dtype = getattr(torch, place.dtype)
        end = place.offset + math.prod(place.shape) * dtype.itemsize
        try:
            if end > len(self.bytes):
                raise ProtocolError(f"a tensor ends at byte {end} of {len(self.bytes)} of shared memory")
            return self.bytes[place.offset : end].view(dtype).view(place.shape)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise ProtocolError(f"shared memory holds no tensor {place}: {error}") from error

    def pin(self) -> None:
        """Pins it, once, so that GPUs' copy engines reach it. Where CUDA cannot, the log says so: copies are slow
        then."""
        if self._pinned is not None:
            return
        address, size = self.bytes.data_ptr(), len(self.bytes)
        code = pin(self.bytes)
        if code != 0:
            log.warning("%.2f GB of shared memory cannot be pinned (CUDA error %d): copies are slow", size / 1e9, code)
        # At the process' end CUDA is gone first.
        self._pinned = weakref.finalize(self, _unpin, address if code == 0 else None)
        self._pinned.atexit = False

    def unpin(self) -> None:
        """Before the memory goes; what goes pinned cannot be pinned again where it was."""
        if self._pinned is not None:
            self._pinned()
            self._pinned = None


def room_for(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes that `SharedMemory.put` takes."""
    return sum(_aligned(t.nbytes) for t in tensors.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _type_name(name: str, tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _TYPES:
        raise ProtocolError(f"tensor {name!r} is {tensor.dtype}, which does not travel")
    return kind


def _unpin(address: int | None) -> None:
    if address is None:
        return
    if code := unpin(address):
        log.warning("shared memory could not be unpinned (CUDA error %d)", code)
