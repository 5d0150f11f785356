"""That the machines of one server have the same code, and still have it when a run begins."""

import importlib.metadata
import re

import pytest

from fastusp_backend.errors import PoolError
from fastusp_backend.server.software import Software

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


@pytest.fixture
def package(tmp_path):
    (tmp_path / "comm").mkdir()
    for name, text in (("comm/peers.py", "CHANNELS = 16\n"), ("errors.py", ""), ("note.txt", "no code")):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("comm/peers.py", "CHANNELS = 17\n", False),
        ("comm/new.py", "", False),
        ("note.txt", "of something else", True),
        ("errors.py", "", True),
    ],
)
def test_code_is_what_counts(package, name, text, same):
    before = Software(package)
    before.check()
    (package / name).write_text(text)
    assert (str(before) == str(Software(package))) is same
    if same:
        before.check()
    else:
        with pytest.raises(PoolError, match=re.escape(f"Restart `serve`: it started with {before}")):
            before.check()


def test_where_code_lies_does_not_count(package, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "package"
    package.rename(other)
    there = str(Software(other))
    other.rename(package)
    assert there == str(Software(package))


def test_torchs_release_counts_and_its_cuda_does_not(package, monkeypatch):
    found = []
    for version in ("2.11.0+cu128", "2.11.0+cu130", "2.13.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        found.append(str(Software(package)))
    assert found[0] == found[1] != found[2] and found[2].endswith("torch 2.13.0")
