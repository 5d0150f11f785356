"""Draws a results file of step.py or ablation.py as bars, one panel per size, text, batch and link. Needs matplotlib.

python benchmarks/plot.py benchmarks/results/NAME.json --out docs/step.svg
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

import report

OURS, PEER, ONE_RANK = "#2a6fdb", "#9aa5b1", "#d0d7de"


def colour(row: dict) -> str:
    if row["ranks"] == 1:
        return ONE_RANK
    return OURS if row["who"] == "ours" else PEER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .json that --out wrote")
    parser.add_argument("--out", type=Path, help=".svg or .png; default: beside the results")
    a = parser.parse_args()
    try:
        import matplotlib.pyplot as plot
    except ImportError as error:
        raise SystemExit("plot.py needs matplotlib: pip install matplotlib") from error

    rows = sorted(json.loads(a.results.read_text(encoding="utf-8"))["rows"], key=report.place)
    panels = [(where, list(group)) for where, group in groupby(rows, key=report.place)]
    heights = [len(group) for _, group in panels]
    figure, axes = plot.subplots(
        len(panels), 1, figsize=(8, 0.32 * sum(heights) + 0.8 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (where, group) in zip(axes[:, 0], panels, strict=True):
        group.sort(key=lambda row: -row["median"])
        names, medians = [report.name(row) for row in group], [row["median"] for row in group]
        bars = axis.barh(names, medians, color=[colour(row) for row in group])
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_title(report.title(where).strip("*"), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms (less is better)", fontsize=8)
    figure.tight_layout()
    out = a.out or a.results.with_suffix(".svg")
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
