"""The part of a file that is its transformer: the tensors under the transformer's own names, and what the file says of
their quantisation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import CheckpointError
from .header import read_file_header
from .source import Source
from .tensor_info import TensorInfo

ALL_IN_ONE = "model.diffusion_model."
_FEW = 5
"""A prefix of no more tensors than these is not taken for a transformer's."""


class _Quantisation(msgspec.Struct):
    """The metadata's `_quantization_metadata`."""

    layers: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Contents:
    """The transformer in a file.

    source: the file, open.
    tensors: those of the transformer, without their prefix.
    names: the names of all tensors, as in the file.
    formats: what the metadata says of layers, by name: {"format": ...} where it is well-formed.
    scaled: whether a tensor `scaled_fp8` marks the file.
    """

    source: Source
    tensors: dict[str, TensorInfo]
    names: tuple[str, ...]
    formats: dict[str, object]
    scaled: bool

    @property
    def path(self) -> str:
        return self.source.path


def read_contents(source: Source, marks: Iterable[frozenset[str]]) -> Contents:
    """Lists what lies in a file, without reading its weights. marks: sets of names, of which a transformer has one.

    Raises CheckpointError for a file that is truncated, corrupt, or of a format that FastUSP does not read.
    """
    tensors, metadata = read_file_header(source)
    prefix = own_prefix(tensors, tuple(marks))
    own = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
    try:
        said = msgspec.json.decode(metadata.get("_quantization_metadata", "{}"), type=_Quantisation)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.path}: what it says of its quantisation is malformed ({error})") from error
    formats = {name.removeprefix(prefix): entry for name, entry in said.layers.items()}
    return Contents(source, own, tuple(tensors), formats, "scaled_fp8" in tensors or "scaled_fp8" in own)


def own_prefix(names: Iterable[str], marks: tuple[frozenset[str], ...]) -> str:
    """The prefix before the transformer's names, one of those that ComfyUI knows; "" for none.

    Where several transformers lie in a file, ComfyUI takes the one of most tensors, and any of its prefixes before
    none. Unlike there, tensors that are no transformer of ours never hide one that is.
    """
    names = set(names)
    counts = {prefix: sum(name.startswith(prefix) for name in names) for prefix in (ALL_IN_ONE, "model.model.", "net.")}
    large = [prefix for prefix in sorted(counts, key=counts.get, reverse=True) if counts[prefix] > _FEW]
    for prefix in (*large, "model.", ""):
        if any(all(prefix + name in names for name in some) for some in marks):
            return prefix
    # None has its marks: the most likely one, so that what is missing can be told.
    return large[0] if large else ALL_IN_ONE if counts[ALL_IN_ONE] else ""
