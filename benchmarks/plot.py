"""Draws measured times as bars. Needs matplotlib.

A results file of step.py or ablation.py gives one panel per size, text, batch and link; a section of a Markdown page,
whose first table is named by its first column and measured in its second, gives one panel:

python benchmarks/plot.py benchmarks/results/NAME.json --out step.svg
python benchmarks/plot.py docs/speed.md --section "One evaluation, beside other engines" --out docs/images/speed.svg
"""

import argparse
import json
import re
import textwrap
from itertools import groupby
from pathlib import Path

import report

Panel = tuple[str, list[tuple[str, float, str]]]
"""A title, and per bar its name, ms and colour."""

OURS, PEER, ONE_RANK = "#2a6fdb", "#9aa5b1", "#d0d7de"


def colour(row: dict) -> str:
    if row["ranks"] == 1:
        return ONE_RANK
    return OURS if row["who"] == "ours" else PEER


def of_results(file: Path) -> list[Panel]:
    rows = sorted(json.loads(file.read_text(encoding="utf-8"))["rows"], key=report.place)
    return [
        (report.title(where).strip("*"), [(report.name(row), row["median"], colour(row)) for row in group])
        for where, group in groupby(rows, key=report.place)
    ]


def of_page(file: Path, section: str) -> list[Panel]:
    """The section's first paragraph is the title. Columns: name, ms, and the number of GPUs."""
    text = file.read_text(encoding="utf-8").partition(f"## {section}\n\n")[2]
    title, _, rest = text.partition("\n\n")
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    if not title or table is None:
        raise SystemExit(f"{file} has no section {section!r} of a paragraph and a table")
    bars = []
    for line in table[0].splitlines()[2:]:
        name, median, gpus = (cell.strip(" `") for cell in line.split("|")[1:4])
        row = {"ranks": int(gpus), "who": "ours" if name.startswith("FastUSP") else "peer"}
        name = name.replace("`", "") + (", one GPU" if row["ranks"] == 1 else "")
        bars.append((name, float(median), colour(row)))
    return [(title.replace("\n", " "), bars)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .json that --out wrote, or a .md page")
    parser.add_argument("--section", default="", help="of the page: its heading")
    parser.add_argument("--out", type=Path, help=".svg or .png; default: beside the results")
    a = parser.parse_args()
    try:
        import matplotlib.pyplot as plot
    except ImportError as error:
        raise SystemExit("plot.py needs matplotlib: pip install matplotlib") from error

    panels = of_page(a.results, a.section) if a.results.suffix == ".md" else of_results(a.results)
    heights = [len(bars) for _, bars in panels]
    figure, axes = plot.subplots(
        len(panels), 1, figsize=(8, 0.32 * sum(heights) + 0.8 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        rows.sort(key=lambda row: row[1])
        names, medians, colours = zip(*rows, strict=True)
        bars = axis.barh(names, medians, color=colours)
        axis.invert_yaxis()
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_title(textwrap.fill(title, 70), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms (less is better)", fontsize=8)
    figure.tight_layout()
    out = a.out or a.results.with_suffix(".svg")
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
