"""The bytes of tensors from a file: mapped on the CPU, where ranks share the pages; on GPUs through small pinned
buffers, so that neither the page cache nor copies of the weights count as a rank's memory.

Threads fill the buffers while copies to the GPU run on a stream of their own: disk, link and GPU work side by side.
Copies from a mapped file would pass through pageable memory, one after the other.

With several GPUs a rank reads its part of every tensor, and an all-gather brings the others': each byte is read and
crosses a host's link once, not once a rank. Parts of tensors, not whole ones: what passes is never more than a tensor.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import torch
import torch.distributed as dist

from ..comm.groups import all_gather_single
from ..errors import CheckpointError
from .source import Source
from .tensor_info import TensorInfo

PIECE = 8 << 20
"""Bytes of one read and one copy to the device."""
READERS = 16
"""Threads that read, each with a pinned buffer of `PIECE` bytes: one alone does not fill the link to a GPU."""


def map_tensors(source: Source, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
    """Each tensor's bytes, (n,) uint8, as views of the mapped file. What is written to them stays with this process;
    what others write to the file may be seen in them, and where they cut it short, reading them ends the process.

    Raises CheckpointError where that has happened already.
    """
    if not infos:
        return []
    mapped = torch.empty(0, dtype=torch.uint8)
    try:
        opened = f"/proc/self/fd/{source.descriptor}"  # the same file, whatever is at its path now
        mapped.set_(torch.UntypedStorage.from_file(opened, False, source.state.size))
    except RuntimeError:
        source.check("while it was being read")
        raise
    views = [mapped[info.start : info.start + info.size] for info in infos]
    aligned = [info.start % info.raw_form[1].itemsize == 0 for info in infos]
    return [view if fits else view.clone() for view, fits in zip(views, aligned, strict=True)]


def empty_bytes(count: int, device: torch.device) -> torch.Tensor:
    """Allocates so many bytes, uint8; raises what torch raises where the device has not got them."""
    return torch.empty(count, dtype=torch.uint8, device=device)


class Shares:
    """How the ranks of `group` share the reading: rank r reads part r of every tensor's bytes; parts are equal, the
    last ones padded. group None: one rank reads everything."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.ranks = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0

    def allocate(self, info: TensorInfo, device: torch.device) -> torch.Tensor:
        """Allocates a buffer for a tensor's bytes and the padding of its parts, uint8."""
        return empty_bytes(-(-info.size // self.ranks) * self.ranks, device)

    def own(self, info: TensorInfo, buffer: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Returns offset in the file and target of the bytes that this rank reads; none where its part is padding
        alone."""
        part = len(buffer) // self.ranks
        start, stop = (min(index * part, info.size) for index in (self.rank, self.rank + 1))
        return info.start + start, buffer[start:stop]

    def gather(self, buffer: torch.Tensor) -> None:
        """Brings the others' parts of a tensor into `buffer`; on a GPU, the current stream waits for them."""
        if self._group is None or not len(buffer):
            return
        part = len(buffer) // self.ranks
        own = buffer[self.rank * part : (self.rank + 1) * part]
        all_gather_single(buffer, own, group=self._group, async_op=True).wait()


def read_tensors(
    source: Source, infos: dict[str, TensorInfo], buffers: dict[str, torch.Tensor], shares: Shares, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, bytes (n,) uint8) of the tensors in turn. Collective over the ranks of `shares`.

    buffers: where some of them shall lie, as `Shares.allocate` makes them; the others get one when they are read.

    Raises CheckpointError naming the tensor that the file does not have to its end.
    """
    if not infos:
        return
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    _after_current(copies)
    stages = [_Stage(copies) for _ in range(READERS)]
    pending: deque[tuple[Future, _Stage, torch.Tensor, str | None, torch.Tensor]] = deque()

    def finish() -> Iterator[tuple[str, torch.Tensor]]:
        future, stage, target, last, buffer = pending.popleft()
        future.result()
        stage.send(target)
        if last is not None:
            if copies is not None:
                torch.cuda.current_stream(device).wait_stream(copies)
            shares.gather(buffer)
            yield last, buffer[: infos[last].size]

    with ThreadPoolExecutor(READERS) as threads:
        for stage, (name, offset, target, last, buffer) in zip(
            cycle(stages), _pieces(infos, buffers, shares, device, copies), strict=False
        ):
            if len(pending) == len(stages):
                yield from finish()  # the copy from this stage's buffer is under way then
            future = threads.submit(
                stage.fill, source.descriptor, offset, len(target), f"tensor {name!r} of {source.path}"
            )
            pending.append((future, stage, target, name if last else None, buffer))
        while pending:
            yield from finish()
    for stage in stages:
        stage.wait()


def _pieces(infos, buffers, shares, device, copies) -> Iterator[tuple[str, int, torch.Tensor, bool, torch.Tensor]]:
    """Yields (tensor's name, offset, target, whether it is the tensor's last, its buffer) for each piece that this rank
    reads."""
    for name, info in infos.items():
        buffer = buffers.get(name)
        if buffer is None:
            buffer = shares.allocate(info, device)
            _after_current(copies)  # which may still read what lay there
        offset, target = shares.own(info, buffer)
        for start in range(0, max(1, len(target)), PIECE):
            yield name, offset + start, target[start : start + PIECE], start + PIECE >= len(target), buffer


def _after_current(copies: torch.cuda.Stream | None) -> None:
    """Has copies wait for what the current stream has been given up to now."""
    if copies is not None:
        copies.wait_stream(torch.cuda.current_stream(copies.device))


class _Stage:
    """A buffer between the file and the device; copies to a GPU run on the stream `copies`."""

    def __init__(self, copies: torch.cuda.Stream | None):
        self._copies = copies
        self._buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=copies is not None)
        self._bytes = memoryview(self._buffer.numpy())
        self._sent = torch.cuda.Event() if copies is not None else None

    def fill(self, descriptor: int, offset: int, count: int, what: str) -> None:
        """Reads once the last content has left. Raises CheckpointError where the file ends before."""
        self.wait()
        done = 0
        while done < count:
            try:
                got = os.preadv(descriptor, [self._bytes[done:count]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{what} cannot be read ({error}); get the file again") from error
            if not got:
                raise CheckpointError(f"{what} cannot be read: the file ends at byte {offset + done}; get it again")
            done += got

    def send(self, target: torch.Tensor) -> None:
        source = self._buffer[: len(target)]
        if self._copies is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            self._sent.record()

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()
