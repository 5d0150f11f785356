"""Memory in whole pages, that processes share and map where they like.

torch's allocators give memory and its address together. Here memory is made first, and mapped then: several pieces one
behind the other, a piece at several addresses, a piece of another process. So what a rank owns of a block, and what
comes to a slot, are one tensor, and nothing is copied for it.

GPUs: CUDA's virtual memory management (CUDA C++ Programming Guide). A kernel sees what a copy has written through
another address if the copy was complete when the kernel began. The host: anonymous files.
"""

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from ..pinning import driver
from .mapped import check


class Piece(Protocol):
    """Memory without an address. It goes when nobody has it any more, nor a mapping of it.

    size: bytes.
    """

    size: int

    def descriptor(self) -> int:
        """Returns a new file descriptor of it, for another process. Raises OSError."""


class Pages(Protocol):
    """A kind of memory."""

    def make(self, size: int) -> Piece:
        """Returns `size` bytes, whole pages. Raises torch.OutOfMemoryError or MemoryError."""

    def open(self, descriptor: int, size: int) -> Piece:
        """Returns the piece of another process that a descriptor is of. Raises as `make`."""

    def map(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Returns pieces, one behind the other, as (n,) uint8. Raises as `make`."""


class _HostPiece:
    def __init__(self, descriptor: int, size: int):
        self.size, self.file = size, descriptor
        weakref.finalize(self, os.close, descriptor)

    def descriptor(self) -> int:
        return os.dup(self.file)


class HostPages:
    """See `Pages`. For CPU ranks, which do the same as GPUs do."""

    def make(self, size: int) -> _HostPiece:
        try:
            piece = _HostPiece(os.memfd_create("fastusp"), size)
            os.ftruncate(piece.file, size)
        except OSError as error:
            raise MemoryError(f"{size} bytes cannot be had: {error}") from error
        return piece

    def open(self, descriptor: int, size: int) -> _HostPiece:
        try:
            return _HostPiece(os.dup(descriptor), size)
        except OSError as error:
            raise MemoryError(str(error)) from error

    def map(self, pieces: Sequence[_HostPiece]) -> torch.Tensor:
        total = sum(piece.size for piece in pieces)
        start = _map(None, total, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        memory = (ctypes.c_uint8 * total).from_address(start)
        weakref.finalize(memory, _libc().munmap, ctypes.c_void_p(start), ctypes.c_size_t(total)).atexit = False
        for piece in pieces:
            _map(start, piece.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, piece.file)
            start += piece.size
        return torch.frombuffer(memory, dtype=torch.uint8)


_NO_ACCESS, _MAP_FIXED = 0, 0x10


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    """The system call, which Python's mmap makes at no given address."""
    got = _libc().mmap(address, size, protection, flags, descriptor, 0)
    if got in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"{size} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
    return got


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_PINNED, _ON_DEVICE, _READ_WRITE, _POSIX, _OUT_OF_MEMORY = 1, 1, 3, 1, 2


class _DevicePiece:
    def __init__(self, handle: int, size: int):
        self.size, self.handle = size, ctypes.c_uint64(handle)
        weakref.finalize(self, _release, handle).atexit = False

    def descriptor(self) -> int:
        found = ctypes.c_int()
        code = driver().cuMemExportToShareableHandle(ctypes.byref(found), self.handle, _POSIX, ctypes.c_uint64(0))
        if code != 0:
            raise OSError(f"GPU memory cannot be shared (CUDA error {code})")
        return found.value


class DevicePages:
    """See `Pages`. Of one GPU; those that it opens may be another one's, which it reaches."""

    def __init__(self, device: torch.device):
        self._device = device
        self._location = _Location(_ON_DEVICE, device.index)

    def make(self, size: int) -> _DevicePiece:
        torch.cuda.synchronize(self._device)  # this thread has a CUDA context from now on
        wanted = _Properties(type=_PINNED, handle_types=_POSIX, location=self._location)
        handle = ctypes.c_uint64()
        code = driver().cuMemCreate(
            ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(wanted), ctypes.c_uint64(0)
        )
        _check(code, "cuMemCreate", size)
        return _DevicePiece(handle.value, size)

    def open(self, descriptor: int, size: int) -> _DevicePiece:
        handle = ctypes.c_uint64()
        code = driver().cuMemImportFromShareableHandle(
            ctypes.byref(handle), ctypes.c_void_p(descriptor), ctypes.c_int(_POSIX)
        )
        _check(code, "cuMemImportFromShareableHandle", size)
        return _DevicePiece(handle.value, size)

    def map(self, pieces: Sequence[_DevicePiece]) -> torch.Tensor:
        total = ctypes.c_size_t(sum(piece.size for piece in pieces))
        start, none = ctypes.c_uint64(), ctypes.c_size_t(0)
        code = driver().cuMemAddressReserve(ctypes.byref(start), total, none, ctypes.c_uint64(0), ctypes.c_uint64(0))
        _check(code, "cuMemAddressReserve", total.value)
        memory = _DeviceMemory(start.value, total.value)
        for piece in pieces:
            size = ctypes.c_size_t(piece.size)
            code = driver().cuMemMap(start, size, none, piece.handle, ctypes.c_uint64(0))
            _check(code, "cuMemMap", piece.size)
            memory.mapped.append((start.value, piece.size))
            start = ctypes.c_uint64(start.value + piece.size)
        access = _Access(self._location, _READ_WRITE)
        code = driver().cuMemSetAccess(ctypes.c_uint64(memory.start), total, ctypes.byref(access), ctypes.c_size_t(1))
        _check(code, "cuMemSetAccess", total.value)
        tensor = torch.as_tensor(memory, device=self._device)
        if tensor.data_ptr() != memory.start:  # what is written to a copy reaches nobody
            raise RuntimeError("torch copies memory that is another GPU's")
        return tensor


def _check(code: int, name: str, size: int) -> None:
    """Raises torch.OutOfMemoryError or RuntimeError where a call of the driver failed."""
    if code == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {name} of {size / 1e6:.0f} MB")
    check(code, name)


class _DeviceMemory:
    """Mapped addresses, of which torch makes a tensor that keeps them."""

    def __init__(self, start: int, size: int):
        self.start, self.mapped = start, []
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (start, False), "version": 2}
        weakref.finalize(self, _unmap, start, size, self.mapped).atexit = False


def _unmap(start: int, size: int, mapped: list[tuple[int, int]]) -> None:
    torch.cuda.synchronize()
    for address, part in mapped:
        check(driver().cuMemUnmap(ctypes.c_uint64(address), ctypes.c_size_t(part)), "cuMemUnmap")
    check(driver().cuMemAddressFree(ctypes.c_uint64(start), ctypes.c_size_t(size)), "cuMemAddressFree")


def _release(handle: int) -> None:
    check(driver().cuMemRelease(ctypes.c_uint64(handle)), "cuMemRelease")
