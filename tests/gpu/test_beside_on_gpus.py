"""Work on a second stream: behind what it reads, awaited by what reads it, and nothing is written that it reads."""

import pytest
import torch

from fastusp_backend.models.beside import Beside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CYCLES = 100_000_000
"""Some hundredths of a second: longer than all that follows takes to be launched and computed."""
SIZE = 1 << 22


@pytest.fixture
def beside():
    return Beside(torch.device("cuda"))


def test_it_starts_behind_the_main_stream(beside):
    x = torch.zeros(SIZE, device="cuda")
    torch.cuda._sleep(CYCLES)
    x.fill_(3)
    with beside.run(x):
        y = x + 1
    beside.join()
    assert (y.clone() == 4).all()


def test_the_main_stream_waits_for_it(beside):
    x = torch.ones(SIZE, device="cuda")
    with beside.run(x):
        torch.cuda._sleep(CYCLES)
        y = x + 1
    beside.join()
    assert (y.clone() == 2).all()


def test_what_it_reads_is_held_until_it_is_awaited(beside):
    x = torch.ones(SIZE, device="cuda")
    with beside.run(x):
        torch.cuda._sleep(CYCLES)
        y = x + 1
    del x
    others = [torch.full((SIZE,), 7.0, device="cuda") for _ in range(4)]
    beside.join()
    assert (y.clone() == 2).all() and len(others) == 4
