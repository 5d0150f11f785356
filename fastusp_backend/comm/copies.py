"""Copies that a copy engine makes, of rows that lie apart too.

torch moves such rows by a kernel, between devices by way of temporaries. CUDA's own copies have a pitch (CUDA driver
API, cuMemcpy2DAsync): to a peer rows of 768 bytes were as fast as one piece, on H100s.
"""

import ctypes

import torch

from ..pinning import driver
from .mapped import check

_MAX_PITCH = 2**31 - 1
"""Bytes, of all GPUs (CU_DEVICE_ATTRIBUTE_MAX_PITCH)."""
_UNIFIED = 4
"""Memory of the host or of a device, by its address."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        (f"{side}_{name}", kind)
        for side in ("source", "target")
        for name, kind in (
            ("x", ctypes.c_size_t),
            ("y", ctypes.c_size_t),
            ("kind", ctypes.c_int),
            ("host", ctypes.c_void_p),
            ("address", ctypes.c_uint64),
            ("array", ctypes.c_void_p),
            ("pitch", ctypes.c_size_t),
        )
    ] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies source to target, of the same shape and type, on the current stream. On GPUs the host's memory must be
    pinned."""
    if not (target.is_cuda or source.is_cuda) or target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    size = target.element_size()
    found = rows(target, source, most=_MAX_PITCH // size)
    if found is None:
        for pair in zip(target, source, strict=True):
            copy(*pair)
        return
    count, width, (target_pitch, source_pitch) = found
    told = _Copy2D(
        source_kind=_UNIFIED,
        source_address=source.data_ptr(),
        source_pitch=source_pitch * size,
        target_kind=_UNIFIED,
        target_address=target.data_ptr(),
        target_pitch=target_pitch * size,
        width=width * size,
        height=count,
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(driver().cuMemcpy2DAsync_v2(ctypes.byref(told), stream), "cuMemcpy2DAsync")


def rows(*tensors: torch.Tensor, most: int) -> tuple[int, int, tuple[int, ...]] | None:
    """How tensors of one shape are rows at equal distances: how many, the values of one, and the distance in each
    tensor, in values, `most` at the most. None where they are not."""
    shape = tensors[0].shape
    dims = [dim for dim in range(len(shape)) if shape[dim] > 1]
    width = 1
    while dims and all(tensor.stride(dims[-1]) == width for tensor in tensors):
        width *= shape[dims.pop()]
    count = 1
    pitches = tuple(tensor.stride(dims[-1]) if dims else width for tensor in tensors)
    if dims and max(pitches) > most:
        return None
    for dim in reversed(dims):
        if any(tensor.stride(dim) != count * pitch for tensor, pitch in zip(tensors, pitches, strict=True)):
            return None
        count *= shape[dim]
    return count, width, pitches
