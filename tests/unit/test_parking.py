"""Weights that leave a device take their own bytes along and nothing else; and what a host has left for them."""

import pytest
import torch
from formats import write
from support import SMALL, load_model, spec_of
from torch import nn

from fastusp_backend.engine import host_memory, parking
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
    assert parking.held_bytes(model) == size
    before = {name: p.clone() for name, p in model.named_parameters()}
    share = parking.HostShare(CPU)
    share.park(model)
    assert size <= share.nbytes < size + 256 * len(before) and not any(p.numel() for p in model.parameters())
    share.reserve()
    share.fetch()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert parking.held_bytes(model) == size


def test_tensors_that_overlap_or_are_strided_come_back_as_they_were():
    memory = torch.arange(1000, dtype=torch.float32)
    parts = memory[10:110], memory[60:160].view(10, 10).t(), memory[500:600].view(10, 10)[:, 2], memory[:0]
    model = nn.Module()
    for i, part in enumerate([*parts, memory[10:110]]):
        model.register_buffer(f"b{i}", part)
    before = [b.clone() for b in model.buffers()]
    assert parking.held_bytes(model) == 4 * (150 + 91)
    share = parking.HostShare(CPU)
    share.park(model)
    share.reserve()
    share.fetch()
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
def test_the_host_must_have_room_for_all_ranks_shares(monkeypatch, ranks, room, parks):
    """They ask at the same time, each before the others have taken theirs."""
    model, share = nn.Module(), parking.HostShare(CPU)
    model.register_buffer("b", torch.arange(40_000, dtype=torch.float32))
    before, size = model.b.clone(), model.b.nbytes
    share._ranks = ranks
    monkeypatch.setattr(parking, "available", lambda: int(room * size))
    if parks:
        share.park(model)
        assert share.nbytes * ranks < 1.05 * size and not model.b.numel()
    else:
        with pytest.raises(MemoryError, match="0.0 GB of host memory are needed to park the weights"):
            share.park(model)
        assert torch.equal(model.b, before) and not share.nbytes


GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(cgroup lines, {file: content}): a machine with 64 GB available."""
    for name in ("_MEMINFO", "_OWN_GROUPS", "_GROUPS"):
        monkeypatch.setattr(host_memory, name, tmp_path / name)
    (tmp_path / "_MEMINFO").write_text("MemTotal: 99 kB\nMemAvailable: 62500000 kB\n")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "_OWN_GROUPS").write_text(own)
        for name, content in files.items():
            path = tmp_path / "_GROUPS" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def v2(folder: str, limit: object, used: int, cache: int) -> dict[str, str]:
    stat = f"anon 5\nactive_file {cache // 2}\ninactive_file {cache // 2}\n"
    values = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {folder + name: value for name, value in values.items()}


def v1(folder: str, limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"active_file 0\ntotal_active_file {cache}\ntotal_inactive_file 0"
    values = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{folder}memory.{name}": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("", {}, 64 * GB),
        ("0::/\n", v2("", "max", 10 * GB, 0), 64 * GB),
        ("0::/\n", v2("", 30 * GB, 20 * GB, 0), 10 * GB),
        ("0::/\n", v2("", 30 * GB, 20 * GB, 8 * GB), 18 * GB),
        ("0::/\n", v2("", 30 * GB, 31 * GB, 0), 0),
        ("0::/a/b\n", v2("a/b/", "max", GB, 0) | v2("a/", 9 * GB, GB, 0), 8 * GB),
        ("0::/../not/mounted\n", v2("", 30 * GB, 20 * GB, 0), 10 * GB),
        ("9:cpu:/x\n4:cpu,memory:/x\n0::/\n", v1("memory/x/", 6 * GB, 3 * GB, GB), 4 * GB),
        ("4:memory:/host/path\n", v1("memory/", 6 * GB, 3 * GB, 0), 3 * GB),
        ("4:memory:/\n", v1("memory/", 2**63 - 4096, 3 * GB, 0), 64 * GB),
    ],
)
def test_what_the_host_has_left(system, own, files, expected):
    system(own, files)
    assert host_memory.available() == expected


def test_a_system_that_does_not_say(system):
    host_memory._MEMINFO.unlink()
    assert host_memory.available() is None
