"""What a step takes on GPUs that need not be there: predicted from the operations of a model, the bytes that travel,
data sheets, and what was reached where it was measured (H100 and H200, see benchmarks/results).

A step of P ranks takes

    F / P / (sustained * peak) * (1 + BESIDE, where P > 1) + KERNELS * streams + MESSAGE * messages

where nothing else is slower, more where the text's tokens are so few that products with them wait for their weights
(`READING`), and what crosses links beside computing or after it (`Prediction.seconds`). Of it only the first part falls
with P. Fitted to FLUX.1 at 1024 x 1024 on H200 with NVLink, 118.6, 66.2, 35.7 and 20.3 ms for P = 1,
2, 4 and 8, the last as benchmarks/scale.py plays one rank's share of so many on two GPUs. Without peer access, where
tokens go through the host's memory, two H200 took 82.8 ms, 70.9 with int8 wire, and a ring of two 88.0 and 73.8; two
with Qwen-Image 98.3 and 82.3, with FLUX.2 228.5; four with FLUX.1 71.4 and 50.4.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import Layout, LinearChoice, WireChoice
from ..weights.dtypes import main_dtype
from ..weights.tensor_info import FP8, TensorInfo
from .cost import StepCost, step_cost
from .family import FamilyConfig
from .placement import Placement

SIZE = 1024, 1024

BESIDE = 0.05
"""How much longer they take where GPUs exchange: the copies beside them, and a share of the heads, cost time."""
KERNELS = 60e-6
"""Seconds of each stream of a block however few tokens a rank has: launches, gaps, kernels that do not fill a GPU."""
MESSAGE = 1e-6
"""Seconds of each peer's messages in a block, however short. Fitted together with `KERNELS` and `READING`; none of the
three was measured alone."""
READING = 0.8
"""The share of its memory's rate at which a GPU reads the weights of products with few rows. Fitted to Qwen-Image on
four and eight GPUs, 41.2 and 25.5 ms, the last played."""
COOL = 0.86
"""What computing takes where GPUs wait between, since they stay below their power limit. Together with its waits it
takes no less than where they never wait: only what they do not use then makes them faster."""
STAGED = 1.4
"""How much longer tokens take by way of the host's memory: into it, then out of it, a piece of a message behind the
other."""
STAGED_RATE = 27
"""GB/s that a GPU was seen to send so, and to receive at the same time, of the 50 that one of these alone reaches."""
STAGED_TOGETHER = 0.05
"""How much longer still for each GPU beyond two, with which they share that memory. Fitted to four under Ulysses; of
more, and of batch groups, it is a guess."""
STAGED_MESSAGE = 66e-6
"""Seconds of each peer's messages in a block that take that way: copies and signals of each."""
HIDDEN = (0.75, 0.77), (0.35, 0.36)
"""Of blocks of one stream, whose MLP is beside attention, and of two: what of their computing hides tokens, and what of
their tokens can be hidden; the last are waited for. Fitted to two GPUs, under Ulysses and in a ring, and to four under
Ulysses: longer rings, rings of Ulysses groups and more GPUs are a guess."""
FP8_PRODUCTS = 0.6
"""Products with `linear = fp8`, of those in 16 bits; measured 0.57 to 0.64."""
EIGHT_BITS = 0.5
"""What travels between GPUs with `wire` in 8 bits, of 16."""
MARGIN = 0.1
"""What is less than this much slower is not told: two predictions that are right to 5 % may be so far apart."""
UNPACKING = {"packed": 3.1, "fp8": 4.0}
"""Bytes of memory traffic for each weight of the blocks' products that is stored so, in each evaluation: measured 8 ms
on H100 and 6.7 on H200, and 5.8 to 8.4 on H200, for FLUX.1's 8.6e9."""
TURN = 30e-6
"""Seconds of each message between machines, however short. Assumed, as the rest of what is said of networks."""
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
class Network:
    """Between machines of so many GPUs each: GB/s that a machine sends, while it receives as much."""

    per_machine: int
    rate: float

    def joins_ulysses(self, layout: Layout) -> bool:
        """Whether a Ulysses group has ranks on several machines."""
        return layout.ulysses > self.per_machine or self.per_machine % layout.ulysses != 0

    def sent(self, layout: Layout, cost: StepCost) -> tuple[float, float, float]:
        """Of what a GPU sends in a step the bytes that stay on its machine, and what its machine sends to others: by
        Ulysses, which is waited for, and round a ring, which is so for what attention does not hide. A ring's position
        has layout.ulysses GPUs, which send together."""
        here, exchanged = self.per_machine, cost.sent_bytes - cost.turned_bytes
        if layout.sequence_ranks <= here:
            return cost.sent_bytes, 0.0, 0.0
        if not self.joins_ulysses(layout):
            return exchanged, 0.0, cost.turned_bytes * layout.ulysses
        away = (layout.ulysses - min(here, layout.ulysses - 1)) / (layout.ulysses - 1)
        return exchanged * (1 - away), exchanged * away * here, cost.turned_bytes * min(here, layout.ulysses)


@dataclass(frozen=True, slots=True)
class Card:
    """By its data sheet.

    tflops: dense, in bf16 with sums in fp32.
    memory: TB/s.
    pcie: the generation, of 16 lanes.
    fp8: whether it has products in fp8.
    nvlink: how such cards may be joined, beside PCIe; None where they cannot, and do not reach each other's memory.
    """

    tflops: float
    memory: float
    pcie: int
    fp8: bool = True
    nvlink: Link | None = None


def over_pcie(generation: int, width: int) -> Link:
    """The link of so many lanes: a generation has twice the rate of the last."""
    rate = 50 * 2.0 ** (generation - 5) * width / 16
    return Link(f"PCIe {generation} x{width}", rate, rate)


PCIE = (over_pcie(5, 16), over_pcie(4, 16), over_pcie(4, 8))


def pcie_of(card: Card) -> tuple[Link, ...]:
    """Those of `PCIE` that a card can have."""
    return tuple(link for link in PCIE if link.host <= over_pcie(card.pcie, 16).host)


def measured_link(rate: float, card: Card) -> Link:
    """One that was measured to carry so many GB/s, between cards of this kind: no PCIe where it carries more than that
    does."""
    host = over_pcie(card.pcie, 16).host
    return Link(f"measured {rate:g} GB/s", rate, min(rate, host), apart=rate > PCIE[0].peers)


CARDS = {
    "H100": Card(989, 3.35, 5, nvlink=Link("NVLink, PCIe 5 x16", 360, 50, apart=True)),
    "H200": Card(989, 4.8, 5, nvlink=Link("NVLink, PCIe 5 x16", 360, 50, apart=True)),
    "A100": Card(312, 2.0, 4, fp8=False, nvlink=Link("NVLink, PCIe 4 x16", 240, 25, apart=True)),
    "RTX 5090": Card(210, 1.79, 5),
    "RTX 4090": Card(165, 1.01, 4),
    "RTX 3090": Card(71, 0.94, 4, fp8=False, nvlink=Link("NVLink bridge, PCIe 4 x16", 45, 25, apart=True)),
}


def known_card(name: str) -> str | None:
    """The card of `CARDS` that a GPU is, by the name that NVML gives it."""
    if re.search(r"Laptop|Max-Q|PCIe|PCIE|NVL|GRID|MIG| D\b", name):  # slower ones
        return None
    return next((known for known in CARDS if re.search(rf"\b{known}\b", name)), None)


def slowest_card(names: Iterable[str]) -> str | None:
    """The card of `CARDS` that GPUs of these names are, the slowest of several; None where one is none of them."""
    cards = [known_card(name) for name in names]
    return None if None in cards else min(cards, key=lambda card: (CARDS[card].tflops, CARDS[card].memory))


def link_of(card: Card, words: Iterable[str], pcie: Iterable[tuple[int, int] | None]) -> Link:
    """What joins GPUs of this card.

    words: how each pair of them is joined, as `nvml.links` has them; NVLink counts where it joins all.
    pcie: each GPU's generation and lanes, of which the slowest counts; None where they are not told, as if they were
        the card's own.
    """
    if card.nvlink is not None and all(word.startswith("NV") for word in words):
        return card.nvlink
    return min((over_pcie(*(found or (card.pcie, 16))) for found in pcie), key=lambda link: link.peers)


def in_milliseconds(seconds: float) -> str:
    """Writes a prediction: whole milliseconds, two digits where they are few."""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 9.5 else f"{ms:#.2g}"


def fewer_are_faster(seconds: Sequence[Mapping[int, float]], count: int) -> int | None:
    """The number of GPUs below `count` on which steps are faster by more than `MARGIN`, the fastest of several; None
    where there is none. seconds: of one or more kinds of steps, by the number of GPUs."""
    fewer = [n for n in seconds[0] if n < count and all(kind[n] * (1 + MARGIN) < kind[count] for kind in seconds)]
    return min(fewer, key=seconds[0].__getitem__, default=None)


class Prediction:
    """Predicts steps of a file's model at SIZE pixels, with as much text as is usual for its family.

    layouts: as `plan_batches` gives them.
    linear, wire: as the options; `auto` as if links were slow.
    """

    def __init__(
        self,
        header: dict[str, TensorInfo],
        config: FamilyConfig,
        layouts: tuple[Layout, ...],
        card: Card,
        linear: LinearChoice,
        wire: WireChoice = "exact",
    ):
        self._config, self._layouts, self._card, self._linear = config, layouts, card, linear
        self._of_tokens = 1 if wire == "exact" else EIGHT_BITS
        packed = any(info.packing for info in header.values())
        self._stored = "packed" if packed else "fp8" if main_dtype(header) in FP8 else ""

    def seconds(self, found: Placement, link: Link, *, prompts: int = 1, network: Network | None = None) -> float:
        """Of a step that evaluates so many prompts, side by side where the layouts say so. What travels and what
        computes hide each other; but tokens that come by the link of the weights hide nothing, nor do other GPUs'
        weights on such a link. network: between the machines, where there are several; link: inside each."""
        layout = next(layout for layout in self._layouts if prompts % layout.batch == 0)
        cost = step_cost(self._config, layout, size=SIZE, text=self._config.text)
        products = (cost.flops - cost.attention) * (FP8_PRODUCTS if self._linear == "fp8" else 1)
        rate = layout.sequence_ranks * self._config.sustained * self._card.tflops * 1e12
        computing = (products + cost.attention) / rate
        if layout.sequence_ranks > 1:
            computing *= 1 + BESIDE
        computing += KERNELS * cost.streams + MESSAGE * cost.messages + self._waiting_for_weights(cost)
        if self._linear == "exact":
            converted = (1 - found.unpacked) * cost.parameters * UNPACKING.get(self._stored, 0)
            computing += converted / (self._card.memory * 1e12)
        inside, waited, turned = network.sent(layout, cost) if network is not None else (cost.sent_bytes, 0.0, 0.0)
        away = 0.0
        if waited or turned:
            per_byte = self._of_tokens / (network.rate * 1e9)
            hidden = cost.attention / rate * (layout.ring - 1) / layout.ring
            messages = cost.messages if network.joins_ulysses(layout) else cost.turns
            away = TURN * messages + waited * per_byte + max(0.0, turned * per_byte - hidden)
        sent, per_machine = inside * self._of_tokens, network.per_machine if network is not None else layout.ranks
        here = self._on_a_machine(found, link, computing, sent)
        if sent and not link.apart:
            whole = max(computing, self._through_the_host(sent, link, computing * COOL, cost, layout, per_machine))
            here = max(here, whole) if found.streamed_bytes else whole
        return prompts / layout.batch * (here + away)

    def _waiting_for_weights(self, cost: StepCost) -> float:
        """Seconds that products of the text's tokens take more than their operations, where they are few."""
        fp8 = self._linear == "fp8"
        reading = cost.text_parameters * (1 if fp8 else 2) / (READING * self._card.memory * 1e12)
        multiplying = 2 * cost.text_tokens * cost.text_parameters * (FP8_PRODUCTS if fp8 else 1)
        return max(0.0, reading - multiplying / (self._config.sustained * self._card.tflops * 1e12))

    def _through_the_host(
        self, sent: float, link: Link, computing: float, cost: StepCost, layout: Layout, per_machine: int
    ) -> float:
        """Seconds where all weights are there. sent: bytes. computing: seconds. per_machine: GPUs of one."""
        beside = min(layout.ranks, per_machine)  # those of other prompts, too
        peers = min(layout.ulysses, per_machine) - 1 + (layout.ring - 1) * (layout.sequence_ranks <= per_machine)
        messages = cost.messages // (layout.ulysses + layout.ring - 2) * peers
        both = self._config.two_stream_blocks
        shares = 1 - both / (cost.streams - both), both / (cost.streams - both)
        tokens = sent / (min(link.peers / STAGED, STAGED_RATE) * 1e9) * (1 + STAGED_TOGETHER * (beside - 2))
        hidden = sum(
            share * min(behind * computing, of * tokens) for share, (behind, of) in zip(shares, HIDDEN, strict=True)
        )
        return computing + tokens - hidden + STAGED_MESSAGE * messages

    def _on_a_machine(self, found: Placement, link: Link, computing: float, sent: float) -> float:
        """computing: seconds. sent: bytes of tokens."""
        weights = found.streamed_bytes / ((link.host if found.source == "host" else link.peers) * 1e9)
        tokens = sent / (link.peers * 1e9)
        if not tokens or link.apart:
            shared = SHARING * len(found.slabs) / found.blocks if found.source == "shared" else 0
            together = tokens + (weights if found.source == "shared" else 0)
            return max(computing * (1 + shared), together, weights)
        if found.source == "host":  # which fills what tokens leave of the link
            return tokens + max(computing, weights)
        return computing + tokens + weights
