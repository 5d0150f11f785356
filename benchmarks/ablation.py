"""The paper's ablation: what each level adds to a step, on each link, and where the time goes.

    python benchmarks/ablation.py --model flux --gpus 2 --link nvlink,slow --out NAME

The baseline is ParaAttention, eager (the paper's own), where it is installed; for Qwen-Image, which it does not know,
diffusers, eager.
"""

import argparse
import tempfile
from pathlib import Path

import report
from breakdown import COLUMNS
from peers import PEERS
from process_sets import LINKS, ProcessSet, run_all
from step import TEXTS, add_common, base_job, known, layouts, numbers
from variants import ABLATION, VARIANTS

from fastusp_backend.cli.table import Column, fitted

BASELINES = {"flux": "paraattention-ulysses", "flux2": "diffusers-ulysses", "qwen": "diffusers-ulysses"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(made)
    made.add_argument("--size", type=int, default=1024, help="edge of the image in pixels")
    made.add_argument("--text", help="token count; default 512 FLUX and Chroma, 256 Qwen-Image, 154 SD3, 128 Z-Image")
    made.add_argument("--layouts", help="one layout for all levels, ulysses x ring such as 2x1; default: planned")
    made.set_defaults(guided=False)
    return made


def table(levels: list[tuple[str, dict]], link: str) -> str:
    """Makes a row per level: its time, what it gains over the level above (blank where the ring starts: it builds on
    nothing above) and over the first, and its breakdown."""
    body, above = [], {}
    for label, row in levels:
        follows = above and (above["who"] != "ours" or above["set"] == row["set"])
        gain = above["median"] / row["median"] if follows else None
        total = levels[0][1]["median"] / row["median"]
        parts = map(row.get("breakdown", {}).get, COLUMNS)
        body.append([label + report.verdict(row), row["median"], gain, total, *parts, row.get("error")])
        above = row
    gains = [Column("x above", format=".2f"), Column("x first", format=".2f")]
    columns = [Column("level"), report.FIGURES["median"], *gains, *report.PARTS, report.FIGURES["error"]]
    return f"**{link}**\n\n{fitted(columns, body, markdown=True)}"


def main() -> None:
    a = parser().parse_args()
    if a.model not in BASELINES:
        raise SystemExit(f"choose a --model of {', '.join(BASELINES)}: no other engine runs {a.model} in parallel")
    baseline = BASELINES[a.model]
    case = {"size": a.size, "texts": numbers(a.text or TEXTS[a.model])[:1], "batch": 1}
    levels = [level for level in ABLATION if a.device == "cuda" or not VARIANTS[level.variant].gpu_only]
    job = base_job(a) | {"cases": [case], "profile": [*VARIANTS, "eager"]}
    links = known(a.link, LINKS, "--link")
    ring = {"batch": 1, "ulysses": 1, "ring": a.gpus}
    sets, labels = [], {}
    for link in links:
        if a.device == "cuda":
            told = job | {"who": baseline, "levels": ["eager"]}
            sets.append(ProcessSet(who=baseline, ranks=a.gpus, link=link, job=told, module=PEERS[baseline].module))
        for note, layout in (("", layouts(a)[0]), (" in a ring", ring)):
            here = [level for level in levels if level.ring == bool(note)]
            if here:
                told = job | {
                    "who": "ours",
                    "variants": [x.variant for x in here],
                    "layouts": [layout],
                    "single": False,
                }
                labels |= {(len(sets), level.variant): level.label for level in here}
                sets.append(ProcessSet(who="ours", note=note, ranks=a.gpus, link=link, job=told))
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        outcome = run_all(sets, Path(folder), seconds=a.timeout, minutes=a.minutes)
        if skipped := [level.label for level in ABLATION if level not in levels]:
            outcome.problems.insert(0, f"{baseline}; {'; '.join(skipped)}: skipped, for GPUs only")
        timed, measured_against = report.finish(outcome.rows)
    size = "tiny" if a.tiny else "full size"
    what = f"Ablation: {a.model}, {size}, {a.size} x {a.size}, text {case['texts'][0]}, {a.gpus} x {a.device}"
    parts = [report.heading(what, outcome.about, measured_against)]
    for link in links:
        rows = [row for row in timed if row["link"] == link]  # in the order in which they ran
        named = [(labels.get((row["set"], row["config"]), f"baseline: {baseline}, eager"), row) for row in rows]
        parts += [table(named, link)] if named else []
    report.publish("\n\n".join(parts), what, outcome, timed, a.out)
    if not timed:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
