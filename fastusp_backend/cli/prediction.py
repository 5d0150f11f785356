"""What a step takes on GPUs that need not be there: predicted from the operations of a model, the bytes that travel,
data sheets, and the shares of them that were reached where it was measured (H100 and H200, see benchmarks/results)."""

import re
from dataclasses import dataclass

from ..config import Layout
from ..models.cost import step_cost
from ..models.family import FamilyConfig
from ..models.placement import Placement
from ..weights.dtypes import main_dtype
from ..weights.tensor_info import FP8, TensorInfo

SIZE, TEXT = (1024, 1024), 512

SUSTAINED = 0.57
"""Share of a card's rate that steps had on H100: FLUX.1 0.55, FLUX.2 0.61, Qwen-Image 0.57."""
FP8_PRODUCTS = 0.75
"""A step with `linear = fp8`, of one in 16 bits; measured 0.74 and 0.75."""
UNPACKING = {"packed": 3.1, "fp8": 8.0}
"""Bytes of memory traffic for each weight of the blocks' products that is stored so, in each evaluation: measured 8 ms,
and 19 to 23 ms, for FLUX.1's 8.6e9 on H100s."""
SHARING = 0.05
"""How much longer a step takes with blocks that all come from other GPUs in time; measured 0.04 and 0.06."""


@dataclass(frozen=True, slots=True)
class Link:
    """GB/s that a GPU receives beside computing: from the others (peers), and from the host's memory. 50 of PCIe 5
    and 360 of NVLink were measured, which is 0.8 of the data sheet; the others are so much of theirs.

    apart: whether tokens take another way than what comes from the host.
    """

    name: str
    peers: float
    host: float
    apart: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Card:
    """By its data sheet.

    tflops: dense, in bf16 with sums in fp32.
    memory: TB/s.
    fp8: whether it has products in fp8.
    nvlink: how such cards may be joined, beside PCIe; None where they cannot, and do not reach each other's memory.
    """

    tflops: float
    memory: float
    fp8: bool = True
    nvlink: Link | None = None


PCIE = (Link("PCIe 5 x16", 50, 50), Link("PCIe 4 x16", 25, 25), Link("PCIe 4 x8", 12.5, 12.5))

CARDS = {
    "H100": Card(989, 3.35, nvlink=Link("NVLink, PCIe 5 x16", 360, 50, apart=True)),
    "H200": Card(989, 4.8, nvlink=Link("NVLink, PCIe 5 x16", 360, 50, apart=True)),
    "A100": Card(312, 2.0, fp8=False, nvlink=Link("NVLink, PCIe 4 x16", 240, 25, apart=True)),
    "RTX 5090": Card(210, 1.79),
    "RTX 4090": Card(165, 1.01),
    "RTX 3090": Card(71, 0.94, fp8=False, nvlink=Link("NVLink bridge, PCIe 4 x16", 45, 25, apart=True)),
}


def known_card(name: str) -> str | None:
    """The card of `CARDS` that a GPU is, by the name that NVML gives it."""
    if re.search(r"Laptop|Max-Q|PCIe|NVL| D\b", name):  # slower ones
        return None
    return next((known for known in CARDS if re.search(rf"\b{known}\b", name)), None)


class Prediction:
    """Predicts steps of a file's model at SIZE pixels with TEXT tokens.

    layouts: as `plan_batches` gives them.
    linear: as the option.
    """

    def __init__(
        self,
        header: dict[str, TensorInfo],
        config: FamilyConfig,
        layouts: tuple[Layout, ...],
        card: Card,
        linear: str,
    ):
        self._config, self._layouts, self._card, self._linear = config, layouts, card, linear
        packed = any(info.packing for info in header.values())
        self._stored = "packed" if packed else "fp8" if main_dtype(header) in FP8 else ""

    def seconds(self, found: Placement, link: Link, *, prompts: int = 1) -> float:
        """Of a step that evaluates so many prompts, side by side where the layouts say so. What travels and what
        computes hide each other; but tokens that come by the link of the weights hide nothing, nor do other GPUs'
        weights on such a link."""
        layout = next(layout for layout in self._layouts if prompts % layout.batch == 0)
        cost = step_cost(self._config, layout, size=SIZE, text=TEXT)
        computing = cost.flops / layout.sequence_ranks / (SUSTAINED * self._card.tflops * 1e12)
        if self._linear == "fp8":
            computing *= FP8_PRODUCTS
        elif not found.unpacked:
            computing += cost.parameters * UNPACKING.get(self._stored, 0) / (self._card.memory * 1e12)
        weights = found.streamed_bytes / ((link.host if found.source == "host" else link.peers) * 1e9)
        tokens = cost.sent_bytes / (link.peers * 1e9)
        if not tokens or link.apart:
            shared = SHARING * len(found.slabs) / found.blocks if found.source == "shared" else 0
            together = tokens + (weights if found.source == "shared" else 0)
            return prompts / layout.batch * max(computing * (1 + shared), together, weights)
        if found.source == "host":  # which fills what tokens leave of the link
            return prompts / layout.batch * (tokens + max(computing, weights))
        return prompts / layout.batch * (computing + tokens + weights)
