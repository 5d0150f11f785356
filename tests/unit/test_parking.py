"""Weights that leave a device take their own bytes along and nothing else."""

import pytest
import torch
from formats import write
from support import SMALL, load_model, spec_of
from torch import nn

from fastusp_backend.engine import parking
from fastusp_backend.models.synthetic import write_checkpoint

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def test_only_the_tensors_bytes_are_parked(tmp_path):
    """In an all-in-one checkpoint they are a small part of the mapped file."""
    plain, path = tmp_path / "plain.safetensors", tmp_path / "all.safetensors"
    write_checkpoint(str(plain), SMALL)
    write("all_in_one", plain, path)
    with open(path, "ab") as file:
        file.truncate(10 * plain.stat().st_size)
    model = load_model(spec_of(plain), CPU)
    size = sum(p.nbytes for p in model.parameters())
    assert parking.resident_bytes(parking.tensors_of(model)) == size
    before = {name: p.clone() for name, p in model.named_parameters()}
    shard = parking.HostShard(CPU)
    shard.park(parking.tensors_of(model))
    assert size <= shard.nbytes < size + 256 * len(before) and not any(p.numel() for p in model.parameters())
    shard.reserve()
    shard.fetch()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert parking.resident_bytes(parking.tensors_of(model)) == size


def test_tensors_that_overlap_or_are_strided_come_back_as_they_were():
    memory = torch.arange(1000, dtype=torch.float32)
    parts = memory[10:110], memory[60:160].view(10, 10).t(), memory[500:600].view(10, 10)[:, 2], memory[:0]
    model = nn.Module()
    for i, part in enumerate([*parts, memory[10:110]]):
        model.register_buffer(f"b{i}", part)
    before = [b.clone() for b in model.buffers()]
    assert parking.resident_bytes(parking.tensors_of(model)) == 4 * (150 + 91)
    shard = parking.HostShard(CPU)
    shard.park(parking.tensors_of(model))
    shard.reserve()
    shard.fetch()
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), before, strict=True))
    model.b0[99] = -1  # 49 values into b1
    assert model.b1[9, 4] == -1 and model.b4[99] == -1


def test_the_order_is_the_models_on_every_rank():
    """Ranks send piece by piece; the addresses of their tensors are in no order."""
    memory = torch.zeros(100, dtype=torch.uint8)
    for starts in ((10, 40, 70), (70, 10, 40)):
        model = nn.Module()
        for i, start in enumerate(starts):
            model.register_buffer(f"b{i}", memory[start : start + 5 + i])
        assert [len(whole) for whole, _ in parking._ranges(list(model.buffers()))] == [5, 6, 7]


def test_tensors_that_merely_touch_stay_apart():
    """As in a file's mapping: one piece of all would be as large as the file, and needed at once on the way back."""
    memory = torch.zeros(64, dtype=torch.uint8)
    parts = [memory[32:64], memory[:16], memory[16:32], memory[24:32]]
    assert [len(whole) for whole, _ in parking._ranges(parts)] == [32, 16, 16]
    assert [len(members) for _, members in parking._ranges(parts)] == [1, 1, 2]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("room, parks", [(1.05, True), (0.9, False)])
def test_the_host_must_have_room_for_all_ranks_shards(monkeypatch, ranks, room, parks):
    """They ask at the same time, each before the others have taken theirs."""
    model, shard = nn.Module(), parking.HostShard(CPU)
    model.register_buffer("b", torch.arange(40_000, dtype=torch.float32))
    before, size = model.b.clone(), model.b.nbytes
    shard._ranks = ranks
    monkeypatch.setattr(parking, "available", lambda: int(room * size))
    if parks:
        shard.park(parking.tensors_of(model))
        assert shard.nbytes * ranks < 1.05 * size and not model.b.numel()
    else:
        with pytest.raises(MemoryError, match="0.0 GB of host memory are needed to park the weights"):
            shard.park(parking.tensors_of(model))
        assert torch.equal(model.b, before) and not shard.nbytes
