"""What bench makes of its measurements, and plan of a file's size."""

import argparse
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fastusp_backend.cli import bench
from fastusp_backend.cli.arguments import pixels
from fastusp_backend.cli.bar import bar
from fastusp_backend.cli.bench import Bench, Row, options, rank_counts, recommend
from fastusp_backend.config import Layout, Settings
from fastusp_backend.devices import Devices

pytestmark = pytest.mark.unit

FOUR = Devices(ranks=4, gpus=(2, 3, 5, 7))


def row(ranks: int, ms: float | None, ring: int = 1, problem: str = "", automatic: bool = True, **settings) -> Row:
    return Row(
        layout=Layout(ulysses=ranks // ring, ring=ring),
        settings=Settings(**settings),
        seconds=ms and ms / 1000,
        problem=problem,
        automatic=automatic,
    )


def test_more_gpus_that_help():
    rows = [row(1, 100), row(2, 55), row(4, 30), row(4, 33, ring=4), row(4, 29.5, wire="int8")]
    (only,) = recommend(rows, FOUR)
    assert only.startswith("Recommended, without loss: gpus = 2,3,5,7 (4 ranks), ulysses = 0, ring = 0 (automatic), ")
    assert only.endswith("wire = exact, linear = exact, attention = auto: 30.0 ms")


def test_a_layout_that_must_be_set_says_what_that_switches_off():
    (only,) = recommend([row(4, 33), row(4, 30, ring=2, automatic=False)], FOUR)
    assert "ulysses = 2, ring = 2 (for cfg 1 and one image: degrees that are set turn batch groups off), wire" in only


def test_fewer_gpus_and_8_bits():
    rows = [row(1, 100), row(2, 98), row(4, 150), row(4, 60, wire="int8"), row(4, 59, wire="fp8", linear="fp8")]
    fewer, exact, lossy = recommend(rows, FOUR)
    assert fewer == "Fewer ranks are the better choice here: 150.0 ms on 4 ranks, 100.0 ms on 1."
    assert "gpus = 2 (1 rank), ulysses = 0, ring = 0 (automatic), wire = exact" in exact
    assert (
        "(4 ranks)" in lossy
        and "wire = fp8, linear = fp8, attention = auto: 59.0 ms" in lossy
        and lossy.endswith("1.69 x as fast")
    )


def test_more_gpus_that_hardly_help():
    fewer, exact = recommend([row(1, 100), row(2, 60), row(4, 59)], FOUR)
    assert (
        fewer.endswith("59.0 ms on 4 ranks, 60.0 ms on 2: more ranks gain less than 3%.")
        and "gpus = 2,3 (2 ranks)" in exact
    )


def test_what_did_not_run():
    refused = row(1, None, problem="rank 0 ran out of memory\nmore")
    assert bench.line(refused, refused).endswith("not run: rank 0 ran out of memory")
    shared = row(4, 80, linear="fp8")
    assert bench.line(shared, refused).split()[7:11] == ["fp8", "auto", "80.0", "-"]
    assert bench.line(row(4, 40), row(1, 80)).split()[7:11] == ["exact", "auto", "40.0", "2.00"]
    assert recommend([refused, shared], FOUR) == [f"In 8 bits, whose error `verify` measures: {shared.choice(FOUR)}"]
    assert "doctor" in recommend([refused], FOUR)[0]


def test_what_is_measured():
    assert [rank_counts(Devices(ranks=n)) for n in (1, 2, 3, 4, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]
    assert [(s["linear"], s["wire"]) for s in options(Devices(ranks=1))] == [("fp8", "exact")]
    assert [(s["linear"], s["wire"]) for s in options(Devices(ranks=2))] == [
        ("exact", "int8"),
        ("exact", "fp8"),
        ("fp8", "exact"),
        ("fp8", "int8"),
        ("fp8", "fp8"),
    ]


def test_attention_in_8_bits_is_timed_where_it_is_installed(monkeypatch):
    """Alone, and beside the rest; GPUs alone have it. A row that it does not run in ends nothing."""
    monkeypatch.setattr(bench, "installed", lambda: ["sage", "flash3-fp8"])
    assert not [option for option in options(Devices(ranks=4)) if "attention" in option]
    for ranks, wire in ((1, "exact"), (2, "int8")):
        devices = Devices(ranks=ranks, gpus=(0, 1)[:ranks])
        assert [option for option in options(devices) if "attention" in option] == [
            {"wire": "exact", "linear": "exact", "attention": "sage"},
            {"wire": "exact", "linear": "exact", "attention": "flash3-fp8"},
            {"wire": wire, "linear": "fp8", "attention": "sage"},
            {"wire": wire, "linear": "fp8", "attention": "flash3-fp8"},
        ]

    def measured(_, row, pool):
        return replace(row, **{"problem": "no"} if row.settings.attention == "sage" else {"seconds": 1.0})

    monkeypatch.setattr(Bench, "measured", measured)
    every = Bench(spec=None, given=(None, None), steps=1, base=Settings(attention="sage"))
    devices = Devices(ranks=1, gpus=(0,))
    found = list(every.rows(devices, 24))
    assert len(found) == every.count(devices, 24) == 6
    assert found[0].exact and found[0].settings.attention == "auto", "what all are compared with has lost nothing"
    assert [row.exact for row in found] == [True] + [False] * 5
    assert [row.name.rpartition(", ")[2] for row in found[1:3]] == ["sage attention", "flash3-fp8 attention"]
    assert "attention = flash3-fp8: " in found[2].choice(devices)


def test_steps_that_warm_up_do_not_count(monkeypatch):
    """They compile and capture: their seconds are told by themselves."""

    class Session:
        def __init__(self, *_):
            pass

        def sample(self, x, sigmas, *, progress, **_):
            assert len(sigmas) == 1 + 1 + 3
            for seconds in (60.0, 2.0, 3.0, 1.0):
                progress.step(SimpleNamespace(seconds=seconds), {})

    monkeypatch.setattr(bench, "Session", Session)
    pool = SimpleNamespace(devices=Devices(ranks=1), held=SimpleNamespace(nbytes=7, transport="none"))
    found = Bench(spec=None, given=(None, None), steps=3).measured(row(1, None), pool)
    assert (found.seconds, found.first, found.nbytes, found.problem) == (2.0, 62.0, 7, "")


def test_the_bar_names_the_phase_that_it_is_in(capsys):
    with bar("two ranks", 3) as progress:
        for phase in ("loading the model", "compiling"):
            progress.phase(phase)
            assert phase in capsys.readouterr().err
        time.sleep(0.11)  # a bar is drawn ten times a second at most
        progress.step(None, {})
        assert "1/3" in (said := capsys.readouterr().err) and "sampling" in said and "compiling" not in said


def test_sizes():
    assert pixels("512") == (512, 512) and pixels("1280x720") == (1280, 720)
    for text in ("8", "1024x", "wide", "1024x8"):
        with pytest.raises(argparse.ArgumentTypeError, match="1280x720"):
            pixels(text)


@pytest.mark.parametrize("fits", [True, False])
def test_8_bits_are_left_out_where_their_exact_row_did_not_run(monkeypatch, fits):
    """And ring 2, where it is the one that ran, is no automatic choice."""

    def measured(_, row, pool):
        assert pool.crowded, "as the pool that it is for"
        if fits and row.layout.ring == 2 or row.settings.linear == "fp8":
            return replace(row, seconds=1.0)
        return replace(row, problem="rank 0 ran out of memory")

    monkeypatch.setattr(Bench, "measured", measured)
    every = Bench(
        spec=None, given=(None, None), steps=1, every_layout=True, base=Settings(attention="math"), crowded=True
    )
    found = list(every.rows(Devices(ranks=2), 24))
    assert {row.settings.attention for row in found} == {"math"}
    assert len(found) <= every.count(Devices(ranks=2), 24) == 8
    rows = [row for row in found if not row.exact]
    assert {row.settings.linear for row in rows} == ({"exact", "fp8"} if fits else {"fp8"})
    assert {row.automatic for row in rows} == {not fits}
