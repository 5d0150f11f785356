"""Frozen descriptions that travel with a request: layout, model file, options.

They are state of a request, never of a pool: changing one restarts no process.
"""

import os
from typing import Literal

import msgspec

from .errors import CheckpointError, LayoutError

DType = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")

AttentionChoice = Literal["auto", "cudnn", "flash", "efficient", "math"]
WireChoice = Literal["exact"]


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How the ranks share one sequence: `ring` groups of `ulysses` ranks each (USP, arXiv 2405.07719).

    Rank r sits at ring position r // ulysses and Ulysses position r % ulysses.
    """

    ulysses: int
    ring: int

    def __post_init__(self):
        if self.ulysses < 1 or self.ring < 1:
            raise LayoutError(f"ulysses and ring must be at least 1, got ulysses={self.ulysses}, ring={self.ring}")

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"ulysses {self.ulysses} x ring {self.ring}"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of USP Optimization Settings.

    wire: what crosses a link; `exact` sends the compute type as it is.
    attention: the local attention back end; `auto` takes the fastest that the device and type allow.
    compile: element-wise segments through the compiler (GPUs). cuda_graphs: a whole evaluation as one graph (GPUs).
    overlap: exchanges run beside computation instead of being awaited where they start.
    """

    wire: WireChoice = "exact"
    attention: AttentionChoice = "auto"
    compile: bool = True
    cuda_graphs: bool = True
    overlap: bool = True


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint and the types it is held and computed in.

    path: absolute. mtime_ns, size: the file's state when the client looked, so that a replaced file is read anew.
    storage: type of the weights in memory, None keeps the file's own. compute: type of the activations.
    """

    path: str
    mtime_ns: int
    size: int
    storage: DType | None
    compute: DType

    @classmethod
    def of_file(cls, path: str, *, storage: DType | None, compute: DType) -> "ModelSpec":
        """Raises CheckpointError when `path` is not a readable file."""
        path = os.path.abspath(path)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"cannot read the model file {path}: {error.strerror}") from error
        return cls(path=path, mtime_ns=stat.st_mtime_ns, size=stat.st_size, storage=storage, compute=compute)
