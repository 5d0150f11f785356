"""Frozen descriptions that travel with a request: layout, model file, options.

They are state of a request, never of a pool: changing one restarts no process.
"""

import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from .errors import CheckpointError, LayoutError, SettingsError

DType = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")
Storage = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]

BatchParallel = Literal["auto", "on", "off"]
AttentionChoice = Literal["auto", "cudnn", "flash", "efficient", "math", "flash3", "sage", "flash3-fp8"]
EIGHT_BIT_ATTENTION: tuple[AttentionChoice, ...] = ("sage", "flash3-fp8")
WireChoice = Literal["exact", "fp8", "auto", "int8"]
LinearChoice = Literal["exact", "fp8"]
Residency = Literal["keep", "park", "release"]
WeightsChoice = Literal["auto", "whole", "shared", "host"]
CacheChoice = Literal["off", "easy", "first_block"]
CacheKind = Literal["easy", "first_block", "easy_in_place", "lazy"]
PatchKind = Literal["lora", "loha", "lokr", "glora", "oft", "boft", "diff", "set"]


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How the ranks share a step: `batch` groups evaluate different prompts or images; inside a group, `ring` groups of
    `ulysses` ranks share one sequence (USP, arXiv 2405.07719).

    Rank r sits at batch position r // (ring x ulysses); its rest, modulo ulysses, is its Ulysses position.
    """

    ulysses: int
    ring: int
    batch: int = 1

    def __post_init__(self):
        if min(self.ulysses, self.ring, self.batch) < 1:
            raise LayoutError(
                f"ulysses, ring and batch must be at least 1, got ulysses={self.ulysses}, ring={self.ring}, "
                f"batch={self.batch}"
            )

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        return self.batch * self.sequence_ranks

    def __str__(self) -> str:
        batch = f"batch {self.batch} x " if self.batch > 1 else ""
        return f"{batch}ulysses {self.ulysses} x ring {self.ring}"


class CacheRule(msgspec.Struct, frozen=True, kw_only=True):
    """When evaluations of a sampling run are skipped.

    kind: `easy` is EasyCache's rule (sampling/cache.py); with `first_block` all blocks but the first are skipped
        (engine/first_block.py). `easy_in_place` and `lazy` are what ComfyUI's nodes make of it: EasyCache where it adds
        to the latents themselves (float32), and LazyCache.
    threshold: how large the change since the last whole evaluation may become, relative to what changes.
    start, end: only evaluations at sigmas up to `start` and above `end` are skipped.
    """

    kind: CacheKind
    threshold: float
    start: float
    end: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of USP Optimization Settings.

    wire: what crosses a link; `exact` sends the compute type as it is, `fp8` e4m3 and `int8` integers with a scale
    per (token, head), `auto` int8 where the measured link is slow.
    attention: the local attention back end; `auto` takes the fastest that the device and type allow. `sage` and
        `flash3-fp8` attend in 8 bits.
    compile: element-wise segments are fused, by kernels of our own that Triton compiles (GPUs).
    cuda_graphs: a whole evaluation is replayed as one graph (GPUs).
    overlap: exchanges run beside computation instead of being awaited where they start; on a GPU that has all tokens of
        a prompt the text's half of a block runs beside the image's.
    ring_pipeline: the ring's next keys and values travel while the current ones are attended.
    linear: how the blocks' matrix products are computed; `fp8` with a scale per token and per row of the weights.
    residency: what becomes of the weights after a sampling run. The client sees to it; the ranks never read it.
    weights: where those of the blocks lie: `whole` on every GPU, `shared` among GPUs that reach each other's memory,
        `host` in memory of the host; `auto` takes the first that fits, for as few blocks as need be.
    cache: which evaluations of a sampling run are skipped, see `CacheRule`. Of this and the next three the client makes
        a rule for each run (`cache_rule`); the ranks never read them.
    cache_threshold: of the rule, at least 0, which skips nothing.
    cache_start, cache_end: the part of the schedule in which evaluations may be skipped, as shares of its steps.
    """

    wire: WireChoice = "exact"
    attention: AttentionChoice = "auto"
    compile: bool = True
    cuda_graphs: bool = True
    overlap: bool = True
    ring_pipeline: bool = True
    linear: LinearChoice = "exact"
    residency: Residency = "keep"
    weights: WeightsChoice = "auto"
    cache: CacheChoice = "off"
    cache_threshold: float = 0.1
    cache_start: float = 0.15
    cache_end: float = 0.95

    def __post_init__(self):
        if not 0 <= self.cache_threshold < float("inf"):
            raise SettingsError(f"set cache_threshold to 0 or more: it is {self.cache_threshold}")
        shares = self.cache_start, self.cache_end
        if not all(0 <= share <= 1 for share in shares):
            raise SettingsError(
                f"set cache_start and cache_end to shares of the schedule, from 0 to 1: they are {shares[0]} and "
                f"{shares[1]}"
            )
        if self.cache != "off" and shares[0] > shares[1]:
            raise SettingsError(
                f"set cache_end to cache_start ({shares[0]}) or more, or cache = off: it is {shares[1]}"
            )

    def without_loss(self) -> "Settings":
        """Returns the same with nothing in 8 bits."""
        attention = "auto" if self.attention in EIGHT_BIT_ATTENTION else self.attention
        return msgspec.structs.replace(self, wire="exact", linear="exact", attention=attention)

    @property
    def lossless(self) -> bool:
        """Whether nothing is sent, multiplied or attended in 8 bits, whatever the devices and links are."""
        return self == self.without_loss()

    @property
    def eight_bits(self) -> str:
        """What `without_loss` undoes, in words; empty where it undoes nothing."""
        exact, names = self.without_loss(), ("wire", "linear", "attention")
        return ", ".join(f"{n} {getattr(self, n)}" for n in names if getattr(self, n) != getattr(exact, n))

    def cache_rule(self, sigmas: Sequence[float]) -> CacheRule | None:
        """The rule for a run over `sigmas`, n + 1 falling levels; None where nothing is skipped."""
        if self.cache == "off":
            return None
        levels = _level(sigmas, self.cache_start), _level(sigmas, self.cache_end)
        return CacheRule(kind=self.cache, threshold=self.cache_threshold, start=levels[0], end=levels[1])


def _level(sigmas: Sequence[float], share: float) -> float:
    """The sigma that is reached after this share of the steps, between steps in proportion; in float32, as those are
    that it is compared with: 0.7 of 10 steps is 7.000000000000001."""
    place = share * (len(sigmas) - 1)
    step = min(int(place), len(sigmas) - 1)
    following = sigmas[min(step + 1, len(sigmas) - 1)]
    (level,) = struct.unpack("f", struct.pack("f", sigmas[step] + (following - sigmas[step]) * (place - step)))
    return level


@functools.lru_cache(maxsize=64)
def _keeps_inodes(device: int) -> bool:
    """Whether a file's inode on this device is its own: FUSE (sshfs, rclone) may number it anew at each lookup."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return True
    name = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2] for line in mounts if line.split()[2] == name]
    return not any(kind.startswith("fuse") for kind in kinds)


class FileState(msgspec.Struct, frozen=True):
    """Which file it is, and when it was last written to: another file at its path is another state, even of the same
    size and time (by a link that leads elsewhere now, or where times are not kept). inode: 0 where it may change by
    itself."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileState":
        inode = stat.st_ino if _keeps_inodes(stat.st_dev) else 0
        return cls(stat.st_dev, inode, stat.st_size, stat.st_mtime_ns)

    def change_to(self, now: "FileState") -> str:
        """What has become of the file, in words; empty where nothing has."""
        if (now.device, now.inode) != (self.device, self.inode):
            return "was replaced"
        if now.size < self.size:
            return f"was cut short, from {self.size} to {now.size} bytes,"
        return "was changed" if now != self else ""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and the types that its model is stored and computed in.

    path: the file's absolute path.
    file: its state when the client looked, so that a replaced file is read anew.
    storage: the type of the weights in memory; None leaves them in the file's own.
    compute: the type of the activations.
    keep_quantised: whether weights that are fp8 or packed in the file stay so, whatever `storage` is for the others.
    linear: as in Settings: the products that the weights serve decide how they are stored.
    weights: as in Settings.
    unpack: whether weights that stay quantised are unpacked to `compute` once, as they are read, on GPUs, as many as
        fit beside what they must keep free; not for products in fp8.
    fingerprint: where `path` is a name alone, of a file that each machine has its own copy of (`library`); else empty.
    """

    path: str
    file: FileState
    storage: Storage | None
    compute: DType
    keep_quantised: bool = False
    linear: LinearChoice = "exact"
    weights: WeightsChoice = "auto"
    unpack: bool = False
    fingerprint: str = ""

    @classmethod
    def of_file(
        cls, path: str, *, storage: Storage | None, compute: DType, keep_quantised: bool = False
    ) -> "ModelSpec":
        """Raises CheckpointError when `path` is not a readable file."""
        path = os.path.abspath(path)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"cannot read the model file {path}: {error.strerror}") from error
        return cls(
            path=path,
            file=FileState.of(stat),
            storage=storage,
            compute=compute,
            keep_quantised=keep_quantised,
        )


class WeightPatch(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one weight; weights/adapters.py has the formulas.

    tensors: role in the formula -> name of the tensor, which travels beside the message.
    strength: what the change is multiplied by.
    strength_model: what the weight is multiplied by before it is changed.
    alpha: the change is scaled by alpha / rank, None for 1; for oft and boft it is the constraint.
    offset: (dim, start, length) of the slice that is changed, None for all.
    swap_halves: whether the change has its halves along dim 0 in the other order.
    reshape: the shape that the weight is widened to first, with zeros behind it.
    """

    kind: PatchKind
    tensors: dict[str, str]
    strength: float
    strength_model: float = 1.0
    alpha: float | None = None
    offset: tuple[int, int, int] | None = None
    swap_halves: bool = False
    reshape: tuple[int, ...] | None = None
