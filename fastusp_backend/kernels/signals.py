"""Signals between GPUs that map each other's memory, one kernel for all peers and messages.

A rank has a word for each sender and channel. Who signals writes 1 into the peer's word, behind all that its stream
did before; who waits takes it back to 0, and what its stream does next sees what was written before. A word is written
again only when it was heard, which is the callers' to see to (comm/peers.py).

Peers are told as a mask: bit p is the rank at position p. So are channels.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

AVAILABLE = triton is not None


def put(pads: torch.Tensor, peers: int, word: int) -> None:
    """Signals on the current stream. pads (P,) int64: the addresses of all ranks' words. word: which one of each."""
    _put_kernel[(1,)](pads, peers, word, triton.next_power_of_2(len(pads)), num_warps=1)


def wait(words: torch.Tensor, peers: int, channels: int) -> None:
    """Makes the current stream wait for these channels of these peers. words (P, channels) int32: this rank's."""
    size, count = words.shape
    _wait_kernel[(1,)](words, peers, channels, triton.next_power_of_2(size), count, num_warps=1)


if triton is not None:

    @triton.jit(do_not_specialize=["peers", "word"])
    def _put_kernel(pads, peers, word, SIZE: tl.constexpr):
        peer = tl.arange(0, SIZE)
        chosen = ((peers >> peer) & 1) != 0
        pad = tl.load(pads + peer, mask=chosen, other=0).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(pad + word, 1, mask=chosen, sem="release", scope="sys")

    @triton.jit(do_not_specialize=["peers", "channels"])
    def _wait_kernel(words, peers, channels, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
        word = tl.arange(0, SIZE * CHANNELS)
        pending = (peers >> (word // CHANNELS)) & (channels >> (word % CHANNELS)) & 1
        while tl.sum(pending, 0) > 0:
            seen = tl.atomic_xchg(words + word, 0, mask=pending != 0, sem="acquire", scope="sys")
            pending = tl.where((pending != 0) & (seen != 1), 1, 0)
