"""Copies of rows that lie apart, and signals, on one GPU. test_exchange.py has them between ranks."""

import pytest
import torch

from fastusp_backend.comm.copies import copy
from fastusp_backend.kernels import signals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VIEWS = {
    "whole": lambda t: t,
    "rows": lambda t: t[0, :, 2],
    "rows of both": lambda t: t[:, :, 2],
    "pieces": lambda t: t[:, 1:4, 2],
    "one": lambda t: t[:1, 2:3, 1:2, :, 1:2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("way", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_copies(dtype, way, view):
    source, target = (torch.zeros(2, 6, 5, 3, 8, dtype=dtype, device=device) for device in way)
    if "cpu" in way:
        source, target = (t.pin_memory() if t.device.type == "cpu" else t for t in (source, target))
    source.copy_(torch.randint(1, 100, source.shape))
    copy(VIEWS[view](target), VIEWS[view](source))
    torch.cuda.synchronize()
    assert torch.equal(VIEWS[view](target).cpu(), VIEWS[view](source).cpu())
    assert target.count_nonzero() == VIEWS[view](source).numel()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_signals_arrive_once_whoever_comes_first(ranks):
    """All ranks' words on one GPU. Rank 0 waits, before and after the others signal."""
    words = [torch.zeros(ranks, 16, dtype=torch.int32, device="cuda") for _ in range(ranks)]
    pads = torch.tensor([t.data_ptr() for t in words], device="cuda")
    others = (1 << ranks) - 2
    waiting = torch.cuda.Stream()
    done = torch.zeros((), device="cuda")
    # A kernel that is loaded while one waits for it would wait for that one: all of them once before.
    signals.put(pads, 1, 4)
    signals.wait(words[0], 1, 1 << 4)
    done += 0
    torch.cuda.synchronize()
    for early in (True, False):
        with torch.cuda.stream(waiting):
            if early:
                signals.wait(words[0], others, 0b101 << 4)
                done += 1
        for rank in range(1, ranks):
            for channel in (4, 6, 7):
                signals.put(pads, 1, rank * 16 + channel)
        with torch.cuda.stream(waiting):
            if not early:
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                signals.wait(words[0], others, 0b101 << 4)
                done += 1
            signals.wait(words[0], others, 1 << 7)
        torch.cuda.synchronize()
        assert not words[0].any() and done == (1 if early else 2)
    signals.put(pads, others, 5)
    torch.cuda.synchronize()
    assert [int(t[0, 5]) for t in words] == [0] + [1] * (ranks - 1)
    assert sum(int(t.sum()) for t in words) == ranks - 1
