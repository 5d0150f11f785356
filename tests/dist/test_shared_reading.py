"""Ranks that each read a part of a file all hold all of it: the way of GPUs, here over gloo on the CPU."""

import os

import pytest
import torch
import torch.distributed as dist
from pools import run_ranks
from safetensors.torch import load_file

from fastusp_backend.weights import reading
from fastusp_backend.weights.header import read_file_header
from fastusp_backend.weights.reading import Shares, read_tensors
from fastusp_backend.weights.source import Source

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")


def _read(rank: int, ranks: int, folder: str, path: str) -> None:
    torch.set_num_threads(1)
    reading.PIECE = 100_003
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    source = Source(path)
    (infos, _), read = read_file_header(source), []
    own = os.preadv

    def counted(descriptor, buffers, offset):
        read.append(own(descriptor, buffers, offset))
        return read[-1]

    os.preadv = counted
    shares = Shares(dist.group.WORLD)
    buffers = {name: shares.allocate(info, CPU) for name, info in list(infos.items())[::2]}
    for name, raw in read_tensors(source, infos, buffers, shares, CPU):
        expected = load_file(path)[name]
        assert torch.equal(raw.view(expected.dtype).view(expected.shape), expected), name
    size = sum(info.size for info in infos.values())
    assert sum(read) <= size / ranks + ranks * len(infos)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_all_ranks_hold_all_bytes_and_each_reads_its_part(schnell, tmp_path, ranks):
    run_ranks(_read, ranks, str(tmp_path), str(schnell), ranks=ranks)
