"""Host memory that GPUs' copy engines reach: any mapped memory, pinned by CUDA's driver.

Not by the runtime's cudaHostRegister: where that fails, torch's next kernel is blamed for it. Nor by torch's
pin_memory, which copies, and rounds up to a power of two.
"""

import ctypes
import functools
import logging

import torch

log = logging.getLogger(__name__)

NO_DRIVER = 303
"""CUDA's own error code for a library that cannot be loaded."""
_PORTABLE = 1
"""Pinned for all of the process' contexts."""


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def pin(memory: torch.Tensor) -> int:
    """Pins the bytes of a contiguous tensor of the host; returns CUDA's error code, 0 for success."""
    torch.cuda.current_stream().synchronize()  # this thread has a CUDA context from now on
    try:
        cuda = driver()
    except OSError as error:
        log.warning("host memory cannot be pinned: %s", error)
        return NO_DRIVER
    return cuda.cuMemHostRegister_v2(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), ctypes.c_uint(_PORTABLE)
    )


def unpin(address: int) -> int:
    """Undoes `pin` for the memory at an address, once the GPU does not use it any more; returns CUDA's error code. To
    be called before the memory goes: what goes pinned cannot be pinned again where it was."""
    torch.cuda.synchronize()
    return driver().cuMemHostUnregister(ctypes.c_void_p(address))
