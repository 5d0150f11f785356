"""Blocks' weights that come to the device as they are needed, into slots, while other blocks compute.

The layers of a streamed block find their weights always at the same address. So one CUDA graph serves for all steps,
with the copies as nodes of it. Blocks take two slots in turn. As one begins, all before it have been computed, in the
order of the main stream: the other slot is free, and the next block is fetched into it, on a stream of its own. The
last block fetches the first, for the next evaluation, into a slot that is not its own: of an odd number of blocks the
last one has a third. Nothing is said to other ranks meanwhile: all read, and nobody writes.

Where tokens cross the same links, copies of weights in front of them delay the attention: a copy engine takes what it
was given first. So weights are given to it bit by bit.

Other GPUs' weights come faster than a block computes. A fetch begins with the block's attention, when the tokens of its
queries, keys and values have arrived; of a large block only half of it, which is there when the attention is done, and
the rest when the attended tokens are back.

From the host they come more slowly, and the link must not rest: equal shares of a fetch begin with each block that
computes until it is needed, with that one's attention, and when its tokens are back. Tokens wait for one share at most.

Each weight is changed (loading, patches) by the rank that owns most of it, in all ranks' memory that it lies in. Before
that all ranks wait for each other, and after it again: a block is changed only when nobody fetches it any more, and
fetched again only when it is changed. Take either wait away and a rank computes with half of a change.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..comm.block_store import BlockStore
from ..comm.groups import world
from ..models.layers import Linear
from ..models.placement import Placement
from ..weights.storage_plan import StoragePlan
from ..weights.stored import Stored


class BlockStream:
    """The streamed blocks of a model.

    placement: which they are.
    plans: the forms of the weights, by name.
    store: where they come from.

    Between evaluations the first block that comes to this rank is in its slot, unless weights were changed: `prime`
    fetches it then.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        plans: dict[str, StoragePlan],
        store: BlockStore,
        device: torch.device,
    ):
        self.placement, self.store = placement, store
        self._device, (self._rank, self._ranks) = device, world()
        self._slabs = slabs = placement.slabs
        self._number_of = {name: number for number, slab in enumerate(slabs) for name in slab.offsets}
        self._layers: dict[str, Linear] = {
            name: model.get_submodule(name.rpartition(".")[0]) for name in self._number_of
        }
        self._plans = {name: plans[name] for name in self._number_of}
        self._number_of_block = {slab.block: number for number, slab in enumerate(slabs)}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies of the next block that were not begun
        self._half = 0  # bytes of the largest block's
        self._share = 0  # bytes that may be fetched in front of tokens, of the next block that comes from the host
        self._fetching = False  # what the main stream has not waited for
        self._primed = False
        self._beside_tokens = placement.beside_tokens
        self._open: int | None = None  # which one is in its slot, to be changed

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of the model, by its name, is streamed."""
        return name in self._number_of

    @property
    def names(self) -> list[str]:
        """The tensors that are streamed, block by block."""
        return list(self._number_of)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The model's tensors whose values are streamed."""
        found = (t for layer in self._layers.values() for t in (layer.weight, layer.scale))
        return [tensor for tensor in found if tensor is not None]

    def owner(self, name: str) -> int:
        """The rank that changes a weight."""
        return self._slabs[self._number_of[name]].owners[name]

    def allocate(self) -> None:
        """Allocates the slots. Raises what torch raises."""
        self.store.allocate_slots()

    def share(self) -> None:
        """Allocates the blocks' memory, unless it is there, and has the layers find their weights. Collective; raises
        OutOfMemoryTogether."""
        self.store.allocate()
        self._half = max(_size(self.store.missing(number)) for number in range(len(self._slabs))) // 2
        for name, layer in self._layers.items():
            layer.stored = Stored(*self._views(name), self._plans[name].packing, layer.low_rank)

    def leave(self) -> None:
        """Gives the device's memory back."""
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        self.store.leave()
        self._primed, self._fetching, self._open, self._waiting = False, False, None, []

    def free(self) -> None:
        """Gives all memory back."""
        self.leave()
        self.store.free()

    # What follows runs in every evaluation, on all ranks in the same order.

    def prime(self, tokens: bool) -> None:
        """Has the first block that comes in its slot. Not within a graph. tokens: whether the evaluation that follows
        exchanges any."""
        self._beside_tokens = tokens and self.placement.beside_tokens
        if not self._primed:
            _copy(self.store.missing(0))
            self._primed = True

    def begin(self, block: int) -> None:
        """Has a block's weights where it computes from, behind what the main stream was given."""
        number = self._number_of_block.get(block)
        if number is not None:
            self._join()
            self._await_next(number)
        if not self._beside_tokens:
            self._fetch()
        elif self.placement.source == "host":
            self._fetch(self._share)

    def tokens_arrived(self) -> None:
        """Says that the links are free while the main stream attends, but for tokens given back meanwhile."""
        self._fetch(self._half if self.placement.source == "shared" else self._share)

    def tokens_returned(self) -> None:
        """Says that they are free until the next block's tokens travel."""
        self._fetch(None if self.placement.source == "shared" else self._share)

    def end(self) -> None:
        """Has the main stream wait for the first block of the next evaluation."""
        self._join()

    # What follows changes weights, between evaluations.

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Weights that this rank owns may be changed inside, behind `open`. A rank that fails there comes to the end
        all the same, and raises then. Collective."""
        self.meet()
        try:
            yield
        finally:
            self.meet()

    def open(self, name: str) -> None:
        """Has a weight where its layer finds it, within `changing`. One that is not streamed is where it always is."""
        number = self._number_of.get(name)
        if number is None or number == self._open:
            return
        self._close()
        _copy(self.store.missing(number))
        self._open = number

    def meet(self) -> None:
        """Waits until all ranks are here, and their devices done with what they were given. What was changed is where
        all fetch it. Collective."""
        self._close()
        self._primed, self._waiting = False, []
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        if self._ranks > 1:
            dist.all_reduce(torch.zeros(1), group=dist.group.WORLD)

    def load(self, name: str, stored: Stored) -> None:
        """Takes a weight that this rank owns from its file; `meet` ends it."""
        if self.owner(name) == self._rank:
            number = self._number_of[name]
            for start, values in zip(self._slabs[number].offsets[name], (stored.data, stored.scale), strict=True):
                if values is not None:
                    self.store.write(number, start, values.contiguous().view(-1).view(torch.uint8))

    def _close(self) -> None:
        """Writes what this rank may have changed to where it came from."""
        number, self._open = self._open, None
        if number is not None:
            for name, (start, start_of_scale) in self._slabs[number].offsets.items():
                if self.owner(name) == self._rank:
                    end = start_of_scale + self._plans[name].nbytes - self._plans[name].data_bytes
                    self.store.give_back(number, start, end - start)

    def _await_next(self, number: int) -> None:
        """Has the fetch of the streamed block behind number `number` wait to be begun."""
        if len(self._slabs) > 1:
            self._waiting = self.store.missing((number + 1) % len(self._slabs))
            next_block = self._slabs[number + 1].block if number + 1 < len(self._slabs) else self.placement.blocks
            occasions = 3 * (next_block - self._slabs[number].block)
            self._share = -(-_size(self._waiting) // occasions)

    def _fetch(self, size: int | None = None) -> None:
        """Begins copies of the next block: of all that waits, or of `size` bytes at most."""
        begun, self._waiting = _split(self._waiting, size)
        if not begun:
            return
        if self._stream is None:
            _copy(begun)
            return
        self._fetching = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(begun)

    def _join(self) -> None:
        self._fetch()
        if self._fetching:
            self._fetching = False
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _views(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A weight's data and scale, as its plan has them, where the layer computes from."""
        number, plan = self._number_of[name], self._plans[name]
        block, (start, start_of_scale) = self.store.block(number), self._slabs[number].offsets[name]
        data = block[start : start + plan.data_bytes].view(plan.dtype).view(plan.shape)
        if plan.scale is None:
            return data, None
        size = plan.nbytes - plan.data_bytes
        return data, block[start_of_scale : start_of_scale + size].view(torch.float32).view(plan.scale)


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """On the current stream."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _size(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(len(target) for target, _ in pairs)


def _split(pairs: list[tuple[torch.Tensor, torch.Tensor]], size: int | None) -> tuple[list, list]:
    """The first `size` bytes of copies, None for all, and the rest."""
    first, rest, left = [], [], _size(pairs) if size is None else size
    for target, source in pairs:
        count = min(left, len(target))
        left -= count
        if count:
            first.append((target[:count], source[:count]))
        if count < len(target):
            rest.append((target[count:], source[count:]))
    return first, rest
