"""Rows of a run to tables: ratios, errors against one rank, markdown and JSON."""

import datetime
import json
import shlex
import sys
from itertools import groupby
from pathlib import Path

import torch
from breakdown import COLUMNS
from paths import RESULTS
from process_sets import Outcome

from fastusp_backend.cli.table import Column, fitted

BASELINES = (("paraattention-ulysses", "eager"), ("diffusers-ulysses", "eager"), ("ours", "eager"))
"""Of these the first that was measured: the paper's own, else what is nearest to it."""
FIGURES = {
    "median": Column("median ms", format=".1f"),
    "min": Column("min", format=".1f"),
    "over_peer": Column("x best peer", format=".2f"),
    "over_baseline": Column("x baseline", format=".2f"),
    "error": Column("error", format=".1e"),
    "own_error": Column("own error", format=".1e"),
    "peak": Column("GiB", format=".1f"),
    "warm_up": Column("warm s", format=".0f"),
}
"""A row's figures, as tables show them; those that it lacks stay blank."""
PARTS = [Column(name, format=".1f") for name in COLUMNS]
"""ms, of a breakdown."""
WRONG = 0.1
"""A lossless engine whose relative error exceeds this computed something else."""


def finish(rows: list[dict]) -> tuple[list[dict], str]:
    """Adds errors, `wrong` and ratios to rows; returns those that were timed, and what `error` is measured against.

    error: relative (Frobenius), against diffusers eager on one rank where a peer ran, else our own; none where that
        reference failed.
    own_error: likewise, ours against our own eager on one rank.
    wrong: whether it is a lossless row whose error exceeds `WRONG`; nothing is compared with it.
    over_peer: how many times faster than the best lossless peer on as many ranks, of the same case and link.
    over_baseline: the same, than the baseline.
    """
    rows = [row for row in rows if "failed" not in row]
    outputs = {row["output"]: torch.load(row["output"], weights_only=True).double() for row in rows}
    theirs = {key(row): row["output"] for row in rows if row["reference"] and row["who"] != "ours"}
    own = {key(row): row["output"] for row in rows if row["reference"] and row["who"] == "ours"}
    timed = [row for row in rows if not row["reference"]]
    for row in timed:
        out = outputs[row.pop("output")]
        case = key(row)
        if case in theirs or case in own:
            row["error"] = _relative(out, outputs[theirs.get(case) or own[case]])
        if row["who"] == "ours" and case in own:
            row["own_error"] = _relative(out, outputs[own[case]])
        row["wrong"] = not (row["lossy"] or row.get("error", 0.0) <= WRONG)  # NaN is wrong, too
    right = [row for row in timed if not row["wrong"]]
    for row in right:
        alike = [other for other in right if place(other) == place(row)]
        peers = [x["median"] for x in alike if x["who"] != "ours" and not x["lossy"] and x["ranks"] == row["ranks"]]
        if peers:
            row["over_peer"] = min(peers) / row["median"]
        base = [x["median"] for name in BASELINES for x in alike if (x["who"], x["config"]) == name]
        if base:
            row["over_baseline"] = base[0] / row["median"]
    return timed, "diffusers, eager, one rank" if theirs else "FastUSP, eager, one rank" if own else ""


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def key(row: dict) -> tuple:
    case = row["case"]
    return case["size"], tuple(case["texts"]), case["batch"]


def place(row: dict) -> tuple:
    return *key(row), row["link"]


def name(row: dict) -> str:
    if row["who"] != "ours":
        return f"{row['who']}, {row['config']}{verdict(row)}"
    return f"FastUSP {row['config']}, {row['layout'] if row['ranks'] > 1 else '1 rank'}{verdict(row)}"


def verdict(row: dict) -> str:
    """Returns what follows a row's name."""
    return ", result wrong" if row.get("wrong") else ""


def tables(timed: list[dict]) -> str:
    """Makes a markdown table per case and link, the fastest last; then the breakdowns."""
    found = []
    for where, group in groupby(sorted(timed, key=place), key=place):
        group = sorted(group, key=lambda row: -row["median"])
        found.append(title(where))
        body = [[name(row), *map(row.get, FIGURES)] for row in group]
        found.append(fitted([Column("configuration"), *FIGURES.values()], body, markdown=True))
        if summary := efficiency(group):
            found.append(summary)
    if any("breakdown" in row for row in timed):
        found += [breakdowns(timed)]
    return "\n\n".join(found)


def title(where: tuple) -> str:
    size, texts, batch, link = where
    return f"**{size} x {size}, text {' and '.join(map(str, texts))}, batch {batch}, {link}**"


def efficiency(group: list[dict]) -> str:
    """Compares our ranks' speed with our own single rank's, of the fastest configuration that ran on both."""
    ours = [row for row in group if row["who"] == "ours" and not row["wrong"]]
    alone = {row["config"]: row["median"] for row in ours if row["ranks"] == 1}
    both = [row for row in ours if row["ranks"] > 1 and row["config"] in alone]
    if not both:
        return ""
    best = min(both, key=lambda row: row["median"])
    share = alone[best["config"]] / best["median"] / best["ranks"]
    return f"Parallel efficiency of {best['config']} on {best['ranks']} ranks against our own 1: {share:.1%}"


def breakdowns(timed: list[dict]) -> str:
    """Makes tables of the ms of one evaluation, and of the longest kernels of the fastest one that was profiled."""
    profiled = [row for row in timed if "breakdown" in row]
    several = len({place(row) for row in profiled}) > 1
    body = []
    for row in profiled:
        label = f"{name(row)}, {row['case']['size']} px, {row['link']}" if several else name(row)
        body.append([label, row["median"], *map(row["breakdown"].get, COLUMNS)])
    fastest = min(profiled, key=lambda row: row["median"])
    kernels = [[k[:90], ms, calls] for k, ms, calls in fastest["breakdown"]["kernels"]]
    times = [Column("ms of one evaluation"), Column("wall", format=".1f"), *PARTS]
    longest = [Column(f"kernels of {name(fastest)}"), Column("ms", format=".2f"), Column("calls", format=".0f")]
    return "\n\n".join([fitted(times, body, markdown=True), fitted(longest, kernels, markdown=True)])


def heading(what: str, about: dict, measured_against: str = "") -> str:
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = f"{about.get('device', 'no device')}, torch {about.get('torch', 'unknown')}"
    errors = f" Errors: relative, against {measured_against}." if measured_against else ""
    return f"# {what}\n\n{datetime.date.today()}, {machine}. Random weights N(0, 1 / fan_in).{errors}\n\n    {command}"


def publish(text: str, what: str, outcome: Outcome, timed: list[dict], out: str | None) -> None:
    """Prints a report; with `out` also writes OUT.md and OUT.json, under results/ unless it is a path."""
    if outcome.problems:
        text += "\n\nNot measured:\n\n" + "\n".join(f"- {problem}" for problem in outcome.problems)
    print(text)
    if out is None:
        return
    data = {"what": what, "date": str(datetime.date.today()), "command": sys.argv, **outcome.about}
    data |= {"rows": timed, "problems": outcome.problems}
    path = Path(out) if "/" in out else RESULTS / out
    for suffix, content in ((".md", text), (".json", json.dumps(data, indent=1))):
        path.with_name(path.name + suffix).write_text(content + "\n", encoding="utf-8")
    print(f"\nwrote {path}.md and .json")
