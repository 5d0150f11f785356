"""Where the tensors of a frame lie: behind the message, or in anonymous shared memory, which has no name that could
outlive a killed process, and goes with its last user.

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
import torch

from ..errors import ProtocolError, RequestError
from ..pinning import pin, unpin

log = logging.getLogger(__name__)

TYPES = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64")
TYPES += ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TYPES += ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
"""torch's names of the types that travel: of torch 2.7 to 2.13 all that a tensor's bytes are enough for and that a rank
can compute from. Quantised types have a scale beside the bytes; torch does not copy those of 1 to 7 bits (uint4),
converts neither bits8 and its kin nor float4_e2m1fn_x2, and does not compare complex32."""
_ALIGNMENT = 256

ADVICE = "close other programs, or where too many files are open, raise `ulimit -n` before ComfyUI starts"


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a tensor lies: `offset` bytes from the memory's start."""

    dtype: Literal[TYPES]
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    offset: Annotated[int, msgspec.Meta(ge=0)]

    def find(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, in memory of bytes. Raises ProtocolError for one that does not lie within it, and for a type
        that the other end's torch has and this one's has not."""
        dtype = getattr(torch, self.dtype, None)
        if dtype is None:
            raise ProtocolError(
                f"Install the same torch at both ends: torch {torch.__version__} has no type {self.dtype}"
            )
        end = self.offset + math.prod(self.shape) * dtype.itemsize
        try:
            if end > len(memory):
                raise ProtocolError(f"a tensor ends at byte {end} of {len(memory)} of a frame's memory")
            return memory[self.offset : end].view(dtype).view(self.shape)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise ProtocolError(f"a frame's memory holds no tensor {self}: {error}") from error


Places = dict[str, Place]


def placed(tensors: dict[str, torch.Tensor]) -> tuple[Places, int]:
    """Where tensors lie one behind the other, each at a multiple of 256 bytes, and the bytes that this takes. Raises
    RequestError for a type that does not travel."""
    places, end = {}, 0
    for name, t in tensors.items():
        places[name] = Place(_type_name(name, t), tuple(t.shape), aligned(end))
        end = places[name].offset + t.nbytes
    return places, end


def put(tensors: dict[str, torch.Tensor], places: Places, memory: torch.Tensor) -> None:
    """Writes tensors of any device to where they lie in memory of bytes."""
    for name, t in tensors.items():
        places[name].find(memory).copy_(t, non_blocking=True)
    for device in {t.device for t in tensors.values() if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def found(places: Places, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that lie in memory of bytes, as they lie there. Raises ProtocolError as `Place.find`."""
    return {name: place.find(memory) for name, place in places.items()}


class SharedTensors(dict[str, torch.Tensor]):
    """Tensors in `memory`, where others find them by `places`."""

    def __init__(self, memory: "SharedMemory", places: Places):
        super().__init__(found(places, memory.bytes))
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


def aligned(size: int) -> int:
    """The next multiple of 256 bytes, at which any type may lie."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _type_name(name: str, tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in TYPES or tensor.layout != torch.strided:
        what = tensor.dtype if kind not in TYPES else tensor.layout
        raise RequestError(
            f"Convert tensor {name!r} to dense float32 before it reaches the sampler: it is {what}, which does not "
            "travel to the workers"
        )
    return kind


def _unpin(address: int | None) -> None:
    if address is None:
        return
    if code := unpin(address):
        log.warning("shared memory could not be unpinned (CUDA error %d)", code)
