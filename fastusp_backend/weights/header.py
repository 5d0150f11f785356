"""The header of a model file: which tensors lie in it, and where. Two formats, safetensors and GGUF, are told apart by
their first bytes, not by the file's name."""

import re

from ..errors import CheckpointError
from .gguf_header import gguf_tensors
from .limits import TooLarge
from .safetensors_header import safetensors_header
from .source import Source
from .tensor_info import TensorInfo

_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?a-z][-a-z]{2}", re.IGNORECASE)
"""Never a safetensors header's length: that would be of GB."""


def read_file_header(source: Source) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of a file, of whatever type, and its metadata (safetensors alone), without reading a tensor.

    Raises CheckpointError for a file that is truncated, corrupt, of another format, or whose header is larger than any
    model's; in bounded time and memory, whatever lies in it.
    """
    path, length = source.path, source.state.size
    begin = source.read(0, min(64, length))
    _refuse_other_downloads(path, begin)
    try:
        if begin[:4] == b"GGUF":
            tensors, metadata = gguf_tensors(source.read, length), {}
        elif begin[:4] == b"PK\x03\x04" or begin[:2] == b"\x80\x02":
            raise CheckpointError(
                f"Convert {path} to safetensors: it is a PyTorch pickle file, which can run code when it is read; "
                "FastUSP reads safetensors and GGUF"
            )
        else:
            tensors, metadata = safetensors_header(source.read, length)
    except TooLarge as error:
        raise CheckpointError(f"Use another file: {path} {error}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    for name, info in tensors.items():
        if info.dtype is not None and (end := info.start + info.size) > length:
            raise CheckpointError(
                f"Download {path} again. It is truncated: tensor {name!r} ends at byte {end}, the file at byte {length}"
            )
    return tensors, metadata


def _refuse_other_downloads(path: str, begin: bytes) -> None:
    """Names what often lies in a model's place, by its first bytes."""
    if _WEB_PAGE.match(begin):
        raise CheckpointError(
            f"Log in where {path} was downloaded, and download the file itself: this is a web page, not a model"
        )
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"Run git lfs pull in the folder of {path}: it is a git-lfs pointer, not a model")


def _unreadable(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Download {path} again, or convert it to safetensors: it cannot be read as safetensors or GGUF ({why}); it is "
        "truncated, corrupt or of another format"
    )
