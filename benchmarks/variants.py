"""Our configurations by name, as options of USP Optimization Settings."""

from dataclasses import dataclass, replace

import paths  # noqa: F401

from fastusp_backend.config import EIGHT_BIT_ATTENTION, Settings


@dataclass(frozen=True, slots=True)
class Variant:
    settings: Settings
    every_step: bool = False
    """Modulations are computed at each step, as other engines do, instead of once a prompt. That is no option of the
    product: the benchmark computes them beside the evaluation."""
    storage: str = ""
    """The format of the blocks' weights, of `storages.STORAGES`; empty: as the model has them."""

    @property
    def gpu_only(self) -> bool:
        return self.settings.compile or self.settings.cuda_graphs

    @property
    def lossy(self) -> bool:
        return not self.settings.lossless or bool(self.storage)


def _variant(*, storage: str = "", **options) -> Variant:
    plain = {"compile": False, "cuda_graphs": False, "overlap": False, "ring_pipeline": False}
    return Variant(Settings(**(plain | options)), storage=storage)


_COMPILE = {"compile": True}
_GRAPH = {"compile": True, "cuda_graphs": True}
_OVERLAP = {"compile": True, "cuda_graphs": True, "overlap": True}
_LOSSLESS = {**_OVERLAP, "ring_pipeline": True}

VARIANTS = {
    "eager": _variant(),
    "eager-overlap": _variant(overlap=True),
    "compile": _variant(**_COMPILE),
    "graph": _variant(**_GRAPH),
    "unpipelined": _variant(**_OVERLAP),
    "overlap": _variant(**_LOSSLESS),
    "wire-fp8": _variant(**_LOSSLESS, wire="fp8"),
    "wire-int8": _variant(**_LOSSLESS, wire="int8"),
    "wire-fp8-unpipelined": _variant(**_OVERLAP, wire="fp8"),
    "linear-fp8": _variant(**_LOSSLESS, linear="fp8"),
    "fp8": _variant(**_LOSSLESS, wire="fp8", linear="fp8"),
    **{name: _variant(**_LOSSLESS, attention=name) for name in EIGHT_BIT_ATTENTION},
    **{f"linear-fp8-{name}": _variant(**_LOSSLESS, linear="fp8", attention=name) for name in EIGHT_BIT_ATTENTION},
    **{f"fp8-{name}": _variant(**_LOSSLESS, wire="fp8", linear="fp8", attention=name) for name in EIGHT_BIT_ATTENTION},
    **{f"weights-{storage}": _variant(**_LOSSLESS, storage=storage) for storage in ("fp8", "Q8_0", "Q4_0")},
    "weights-Q4_0-eager": _variant(storage="Q4_0"),
    "wire-fp8-eager": _variant(wire="fp8", overlap=True, ring_pipeline=True),
    "linear-fp8-eager": _variant(linear="fp8"),
    "graph-no-compile": _variant(cuda_graphs=True, overlap=True),
}
VARIANTS |= {f"{name}+mods": replace(variant, every_step=True) for name, variant in VARIANTS.items()}
"""`+mods`: modulations at every step."""


@dataclass(frozen=True, slots=True)
class Level:
    """A row of the ablation: a variant, under the planned layout or with all ranks in a ring."""

    label: str
    variant: str
    ring: bool = False


ABLATION = (
    Level("our kernels and schedule, eager", "eager+mods"),
    Level("+ compiled segments", "compile+mods"),
    Level("+ CUDA graph", "graph+mods"),
    Level("+ overlap", "overlap+mods"),
    Level("+ modulations once a prompt", "overlap"),
    Level("+ fp8 wire", "wire-fp8"),
    Level("+ fp8 products", "fp8"),
    Level("lossless, in a ring that is not pipelined", "unpipelined", ring=True),
    Level("+ pipelined ring", "overlap", ring=True),
    Level("+ fp8 wire", "wire-fp8", ring=True),
)
"""Each adds one thing to the one above; the ring starts again from the lossless engine."""
