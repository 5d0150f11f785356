"""Reading through small buffers: every byte arrives, a file that ends early names the tensor."""

import os

import pytest
import torch

from fastusp_backend.errors import CheckpointError
from fastusp_backend.weights import reading
from fastusp_backend.weights.reading import Shares, map_tensors, read_tensors
from fastusp_backend.weights.source import Source
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SIZES = (1, 63, 64, 65, 1000, 7, 0, 4096, 640)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """(the file, what its tensors are, what their bytes are), with buffers that are smaller than most tensors."""
    monkeypatch.setattr(reading, "PIECE", 64)
    monkeypatch.setattr(reading, "READERS", 3)
    data = os.urandom(sum(SIZES) + 5)
    (tmp_path / "file").write_bytes(data)
    infos, contents, start = {}, {}, 5
    for i, size in enumerate(SIZES):
        infos[f"t{i}"] = TensorInfo((size,), torch.uint8, start)
        contents[f"t{i}"] = data[start : start + size]
        start += size
    return Source(str(tmp_path / "file")), infos, contents


@pytest.mark.parametrize("kept", [(), ("t0", "t4", "t7")], ids=["no buffer", "buffer"])
def test_every_byte_arrives(file, kept):
    source, infos, contents = file
    buffers = {name: Shares().allocate(infos[name], CPU) for name in kept}
    got = dict(read_tensors(source, infos, buffers, Shares(), CPU))
    assert {name: bytes(tensor.numpy()) for name, tensor in got.items()} == contents
    assert list(got) == list(infos)
    assert all(got[name].data_ptr() == buffer.data_ptr() for name, buffer in buffers.items())


def test_mapped_tensors_are_the_same_and_keep_the_file(file):
    source, infos, contents = file
    os.chmod(source.path, 0o444)
    views = dict(zip(infos, map_tensors(source, list(infos.values())), strict=True))
    assert {name: bytes(tensor.numpy()) for name, tensor in views.items()} == contents
    views["t4"].zero_()
    again = dict(zip(infos, map_tensors(source, list(infos.values())), strict=True))
    assert bytes(again["t4"].numpy()) == contents["t4"]


def test_a_file_that_became_shorter_names_the_tensor(file):
    source, infos, _ = file
    os.truncate(source.path, 5 + sum(SIZES[:4]) + 100)
    with pytest.raises(CheckpointError, match="tensor 't4' of .* cannot be read: the file ends at byte"):
        list(read_tensors(source, infos, {}, Shares(), CPU))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_cover_every_tensor_once(file, ranks):
    source, infos, contents = file
    for name, info in infos.items():
        whole, parts = b"", []
        for rank in range(ranks):
            shares = Shares()
            shares.ranks, shares.rank = ranks, rank
            buffer = shares.allocate(info, CPU)
            offset, target = shares.own(info, buffer)
            assert len(target) <= -(-info.size // ranks)
            parts.append(len(target))
            with open(source.path, "rb") as opened:
                opened.seek(offset)
                whole += opened.read(len(target))
        assert whole == contents[name] and sum(parts) == info.size
