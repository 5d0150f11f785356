"""What verify measures on which devices."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from fastusp_backend import shapes
from fastusp_backend.__main__ import main
from fastusp_backend.cli import verify
from fastusp_backend.cli.clock import Clock
from fastusp_backend.cli.verify import Row
from fastusp_backend.config import Settings
from fastusp_backend.devices import Devices
from fastusp_backend.errors import RequestError
from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint
from fastusp_backend.pool import Progress
from fastusp_backend.protocol import Done

pytestmark = pytest.mark.unit


def test_options_alone_and_together(monkeypatch):
    """Attention in 8 bits where it is installed, on GPUs."""
    monkeypatch.setattr(verify, "installed", lambda: ["sage", "flash3-fp8"])
    fp8, int8 = ({"wire": wire, "linear": "fp8"} for wire in ("fp8", "int8"))
    assert list(verify.options_of(Devices(ranks=1))) == ["fp8 products"]
    assert list(verify.options_of(Devices(ranks=2)).values()) == [
        {"wire": "fp8"},
        {"wire": "int8"},
        {"linear": "fp8"},
        fp8,
        int8,
    ]
    found = verify.options_of(Devices(ranks=2, gpus=(0, 1)))
    assert list(found)[5:] == [
        "sage attention",
        "fp8 attention",
        "fp8 wire and fp8 products, sage attention",
        "int8 wire and fp8 products, sage attention",
        "fp8 wire and fp8 products, fp8 attention",
        "int8 wire and fp8 products, fp8 attention",
    ]
    assert list(found.values())[-2:] == [fp8 | {"attention": "flash3-fp8"}, int8 | {"attention": "flash3-fp8"}]
    alone = verify.options_of(Devices(ranks=1, gpus=(0,)))
    assert alone["fp8 products, fp8 attention"] == {"linear": "fp8", "attention": "flash3-fp8"}
    assert not any(Settings(**option).lossless for option in (found | alone).values())


def test_caches_alone_and_beside_all_there_is_in_8_bits(monkeypatch):
    monkeypatch.setattr(verify, "installed", lambda: ["flash3-fp8"])
    found = verify.with_caches(verify.options_of(Devices(ranks=2, gpus=(0, 1))))
    lossy, cached = [*found][:8], [*found][8:]
    assert lossy == [*verify.options_of(Devices(ranks=2, gpus=(0, 1)))]
    most = "int8 wire and fp8 products, fp8 attention"
    assert cached == [*verify.CACHES, f"{most}, cache easy", f"{most}, cache first_block"]
    eight_bits = {"wire": "int8", "linear": "fp8", "attention": "flash3-fp8"}
    assert found[cached[-1]] == eight_bits | {"cache": "first_block", "cache_threshold": 0.1}, (
        "a recommendation says it"
    )
    alone = verify.with_caches(verify.options_of(Devices(ranks=1)))
    assert [*alone] == ["fp8 products", *verify.CACHES, "fp8 products, cache easy", "fp8 products, cache first_block"]
    assert all(Settings(**option) for option in (found | alone).values())


def row(seconds: float | None, decibels: float | None, met: int = 6, **option) -> Row:
    return Row(option, "", [0.01, 0.02], seconds, decibels, met)


NOT_RUN = Row({"wire": "fp8"}, "no room")
WIRE, LINEAR = row(0.9, 60.0, wire="int8"), row(0.6, 41.0, linear="fp8")
EASY, FIRST = row(0.5, 35.0, cache="easy", cache_threshold=0.1), row(0.49, 31.0, cache="first_block")


@pytest.mark.parametrize(
    "rows, at_40, at_30",
    [
        ([WIRE, LINEAR, EASY, FIRST], "linear = fp8: 600.0", "cache = easy, cache_threshold = 0.1: 500.0"),
        ([WIRE, LINEAR, row(0.3, 45.0, met=5)], "linear = fp8: 600.0", "linear = fp8: 600.0"),
        (
            [WIRE, row(0.3, None), row(None, 60.0), NOT_RUN],
            "wire = int8: 900.0",
            "wire = int8: 900.0",
        ),
        ([row(0.98, 60.0), EASY], "exact values, 1000.0", "cache = easy, cache_threshold = 0.1: 500.0"),
    ],
    ids=["all", "fewer captions", "not run", "hardly faster"],
)
def test_the_fastest_for_an_error(rows, at_40, at_30):
    """Of two that are as fast the closer one; none that meets fewer captions than exact values."""
    said = verify.recommend(rows, 1.0, 6)
    assert len(said) == 2
    assert said[0].startswith(f"For 40 dB: {at_40} ms a step") and said[1].startswith(f"For 30 dB: {at_30} ms a step")


@pytest.mark.parametrize("rows", [[], [NOT_RUN, row(0.5, None)]], ids=["none", "no pictures"])
def test_nothing_is_recommended_by_no_pictures(rows):
    assert verify.recommend(rows, 1.0, None) == [
        "Nothing can be recommended: no option has pictures and a time of its steps."
    ]


def test_what_a_recommendation_says_besides():
    (said, _) = verify.recommend([LINEAR], 1.0, 6)
    assert said.endswith("1.67 x as fast as exact values; 41.0 dB in the pictures, 2.0e-02 in the latents.")


def test_why_there_are_no_pictures_is_said():
    drawn = verify._Drawn(torch.zeros(1, 3, 8, 8), 0)
    few = "install version 2: version 1 is right for multiples of 64\nmore"
    found = {"exact values": drawn, "sage": few, "wire": drawn, "all": few, "other": "no room"}
    assert verify.undrawn(found) == [
        "no pictures of sage; all: install version 2: version 1 is right for multiples of 64",
        "no pictures of other: no room",
    ]
    assert verify.undrawn({"exact values": "no room", "wire": "no room"}) == ["no pictures of any option: no room"]


def test_steps_are_timed_and_those_that_warm_up_are_not():
    stepped, ends = [], []

    @contextlib.contextmanager
    def watch(name, total):
        yield Progress(step=lambda event, tensors: stepped.append(event))
        ends.append((name, total))

    clock = Clock(watch)
    for seconds in ([9.0], [1.0, 3.0]):
        with clock("wire", len(seconds)) as progress:
            for event in [None, *(SimpleNamespace(seconds=s) for s in seconds)]:
                progress.step(event, {})
    assert clock.step("wire") == 2.0 and clock.step("other") is None
    assert len(stepped) == 5 and ends == [("wire", 1), ("wire", 2)]


class Counted:
    """A session whose steps take a second, 0.1 where they are skipped: all but 4 by a threshold that nothing reaches,
    else none of the file's and half of the pictures'. The latents are the noise."""

    def __init__(self, pool, spec, layouts, settings):
        self.settings, self.pictures = settings, spec.path == str(shapes.MODEL)

    def evaluate(self, x, timestep, prompt, progress):
        return x

    def sample(self, x, sigmas, *, progress, **_):
        steps, skipped = len(sigmas) - 1, 0
        if self.settings.cache != "off":
            skipped = steps - 4 if self.settings.cache_threshold > 1 else steps // 2 if self.pictures else 0
        for number in range(steps):
            progress.step(SimpleNamespace(seconds=0.1 if number < skipped else 1.0), {})
        progress.done(Done(id=0, skipped=skipped))
        return x


class OnePicture(Counted):
    """Draws with exact values alone."""

    def sample(self, x, sigmas, **given):
        if self.pictures and self.settings != Settings():
            raise RequestError("not so many tokens\nof a picture")
        return super().sample(x, sigmas, **given)


def said_of(session, tmp_path, monkeypatch, capsys) -> str:
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), TINY_FLUX, seed=1)
    for name, value in {"Session": session, "CAPTIONS": 1, "PIXELS": 64}.items():
        monkeypatch.setattr(verify, name, value)
    monkeypatch.setattr(verify, "Pool", lambda devices: SimpleNamespace(devices=devices, close=lambda: None))
    given = ("verify", str(path), "--gpus", "cpu:1", "--size", "64", "--text", "4", "--steps", "5")
    monkeypatch.setattr(sys, "argv", ["fastusp_backend", *given])
    assert main() == 0
    return capsys.readouterr().out


def test_caches_are_timed_where_they_skip_what_they_skip_of_the_pictures(tmp_path, monkeypatch, capsys):
    """Of a file's random inputs they may skip nothing, which says nothing of what they gain at those dB."""
    said = said_of(Counted, tmp_path, monkeypatch, capsys)
    rows = {line[:60].strip(): line[60:].split() for line in said.splitlines()}
    assert rows["cache easy, threshold 0.1"][4] == rows["fp8 products, cache easy"][4] == "550.0"
    assert rows["cache easy, threshold 0.1"][-2:] == ["0", "14"], "skipped of the file's steps, and of the pictures'"
    assert rows["fp8 products"][4] == "1000.0"
    assert "550.0 ms a step, 1.82 x as fast" in said and "no pictures of" not in said and "\n\n" not in said


def test_options_without_pictures_are_named(tmp_path, monkeypatch, capsys):
    said = said_of(OnePicture, tmp_path, monkeypatch, capsys)
    (line,) = [line for line in said.splitlines() if line.startswith("no pictures of ")]
    assert line.startswith("no pictures of fp8 products; cache easy, threshold 0.05; ")
    assert line.endswith(", cache first_block: not so many tokens")
    assert "Nothing can be recommended" in said
