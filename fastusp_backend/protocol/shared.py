"""Tensors in anonymous shared memory, in the safetensors format.

Written part by part from the tensors' own memory, and mapped where they are read: hundreds of megabytes cost one copy.
"""

import fcntl
import json
import os

import safetensors.torch
import torch

from ..errors import ProtocolError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def share_tensors(tensors: dict[str, torch.Tensor]) -> int:
    """Writes contiguous CPU tensors; returns the descriptor, the caller's to close. Sealed against being cut short
    under the feet of those who map it. Raises ProtocolError for a type that does not travel."""
    # Wide types first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header, end = {}, 0
    for name, t in ordered:
        if t.dtype not in _NAMES:
            raise ProtocolError(f"tensor {name!r} is {t.dtype}, which does not travel")
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    fd = os.memfd_create("fastusp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, t in ordered:
                file.write(t.reshape(-1).view(torch.uint8).numpy())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_tensors(fd: int) -> dict[str, torch.Tensor]:
    """The tensors in shared memory, mapped; the descriptor is not needed any more then. Raises ProtocolError where it
    is none, or not sealed."""
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("a frame's shared memory is not sealed")
        return safetensors.torch.load_file(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise ProtocolError(f"a frame's descriptor is no shared memory: {error}") from error
