"""What verify measures on which devices."""

import pytest

from fastusp_backend.cli import verify
from fastusp_backend.config import Settings
from fastusp_backend.devices import Devices

pytestmark = pytest.mark.unit


def test_options_alone_and_together(monkeypatch):
    """Attention in 8 bits where it is installed, on GPUs."""
    monkeypatch.setattr(verify, "installed", lambda: ["sage", "flash3-fp8"])
    both = {"wire": "int8", "linear": "fp8"}
    assert list(verify.options_of(Devices(ranks=1))) == ["fp8 products"]
    assert list(verify.options_of(Devices(ranks=2)).values()) == [
        {"wire": "fp8"},
        {"wire": "int8"},
        {"linear": "fp8"},
        both,
    ]
    found = verify.options_of(Devices(ranks=2, gpus=(0, 1)))
    assert list(found)[4:] == [
        "sage attention",
        "fp8 attention",
        "int8 wire and fp8 products, sage attention",
        "int8 wire and fp8 products, fp8 attention",
    ]
    assert list(found.values())[-2:] == [both | {"attention": "sage"}, both | {"attention": "flash3-fp8"}]
    alone = verify.options_of(Devices(ranks=1, gpus=(0,)))
    assert alone["fp8 products, fp8 attention"] == {"linear": "fp8", "attention": "flash3-fp8"}
    assert not any(Settings(**option).lossless for option in (found | alone).values())
