"""One step of a full-size model with random weights: FastUSP under its options and other engines, in one run.

    python benchmarks/step.py --model flux --gpus 2 --single --out NAME

Prints a table per size, text length, batch and link: medians, ratios, relative errors, memory. README.md beside this
file tells how to read it. Each engine runs in processes of its own, our last variant again at the end.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path

import report
from common import CONFIGS, MODELS
from peers import LEVELS, PEERS
from process_sets import LINKS, ProcessSet, run_all
from variants import VARIANTS

from fastusp_backend.config import Layout
from fastusp_backend.planner import plan

TEXTS = {"flux": "512", "flux2": "512", "chroma": "512", "qwen": "256", "z_image": "128"}
TEXTS |= dict.fromkeys(("sd3", "sd35_medium", "sd3_medium"), "154")
GUIDED_TEXTS = "35,6"


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(made)
    made.add_argument("--variants", default="eager,compile,graph,overlap", help=f"of: {', '.join(VARIANTS)}")
    made.add_argument("--peers", default="diffusers,paraattention", help=f"of: {', '.join(PEERS)}; or parts of names")
    made.add_argument("--levels", default=",".join(LEVELS), help="how peers run")
    made.add_argument("--sizes", default="1024", help="edges of the image in pixels")
    made.add_argument(
        "--text", help="token counts; default 512 FLUX and Chroma, 256 Qwen-Image, 154 SD3, 128 Z-Image; 35,6 guided"
    )
    made.add_argument("--batch", default="1", help="images")
    made.add_argument("--layouts", help="ulysses x ring, such as 2x1,1x2, or batch x ulysses x ring; default: planned")
    made.add_argument("--guided", action="store_true", help="one step of two prompts, of --text's two lengths")
    made.add_argument("--single", action="store_true", help="one GPU too: our last variant, and diffusers")
    made.add_argument("--profile", default="", help="names of variants or levels to break down")
    made.add_argument("--no-repeat", action="store_true", help="do not run our last variant again at the end")
    return made


def add_common(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", choices=MODELS, default="flux")
    made.add_argument("--gpus", type=int, default=2, help="ranks")
    made.add_argument("--link", default="nvlink", help=f"of: {', '.join(LINKS)} (see process_sets.py)")
    made.add_argument("--count", type=int, default=12, help="timed evaluations of each configuration")
    made.add_argument("--tiny", action="store_true", help="2 blocks of 512 channels instead of the full size")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--timeout", type=float, default=150, help="seconds for one process set")
    made.add_argument("--minutes", type=float, default=7, help="no set is started after so many")
    made.add_argument("--out", help="write OUT.md and OUT.json under benchmarks/results/, or to this path")


def layouts(a: argparse.Namespace) -> list[dict]:
    """Returns the layouts as `Layout`'s fields."""
    if a.layouts:
        found = []
        for text in a.layouts.split(","):
            *batch, ulysses, ring = (int(x) for x in text.split("x"))
            found.append({"batch": batch[0] if batch else 1, "ulysses": ulysses, "ring": ring})
    else:
        heads = CONFIGS[a.model, a.tiny].heads
        one = plan(a.gpus, heads)
        found = [{"batch": 1, "ulysses": one.ulysses, "ring": one.ring}]
        if a.guided and a.gpus % 2 == 0:
            half = plan(a.gpus // 2, heads)
            found.insert(0, {"batch": 2, "ulysses": half.ulysses, "ring": half.ring})
    for layout in found:
        if Layout(**layout).ranks != a.gpus:
            raise SystemExit(f"--layouts: {Layout(**layout)} does not fit --gpus {a.gpus}")
    return found


def cases(a: argparse.Namespace) -> list[dict]:
    counts = numbers(a.text or (GUIDED_TEXTS if a.guided else TEXTS[a.model]))
    if a.guided and len(counts) != 2:
        raise SystemExit(f"--guided takes two text lengths, not --text {a.text}")
    texts = [tuple(counts)] if a.guided else [(n,) for n in counts]
    every = product(numbers(a.sizes), texts, numbers(a.batch))
    return [{"size": size, "texts": text, "batch": batch} for size, text, batch in every]


def known(text: str, names, what: str) -> list[str]:
    """Reads the names in a comma-separated list. Raises SystemExit for unknown ones."""
    wanted = [x for x in text.split(",") if x]
    if unknown := [x for x in wanted if x not in names]:
        raise SystemExit(f"{what}: unknown {', '.join(unknown)}; choose from: {', '.join(names)}")
    return wanted


def chosen_peers(a: argparse.Namespace) -> list[str]:
    found = []
    for wanted in filter(None, a.peers.split(",")):
        matching = [name for name in PEERS if wanted == name or name.startswith(f"{wanted}-")]
        if not matching:
            raise SystemExit(f"--peers: unknown {wanted}; choose from: {', '.join(PEERS)}")
        found += [name for name in matching if wanted == name or not PEERS[name].alone or a.single or a.gpus == 1]
    return found


def reason_to_skip(name: str, a: argparse.Namespace) -> str:
    """Says why a peer does not run here; empty if it does."""
    peer = PEERS[name]
    if a.model not in peer.models:
        return f"does not know {a.model}"
    if not peer.alone and a.gpus == 1:
        return "needs more than one GPU"
    return "for GPUs only" if a.device == "cpu" and not peer.alone else ""


def base_job(a: argparse.Namespace) -> dict:
    """Returns what every process set is told."""
    return {name: getattr(a, name) for name in ("model", "tiny", "device", "count")}


def process_sets(a: argparse.Namespace) -> tuple[list[ProcessSet], list[str]]:
    """Returns the sets in order, and what is left out and why."""
    variants, levels = known(a.variants, VARIANTS, "--variants"), known(a.levels, LEVELS, "--levels")
    peers = chosen_peers(a)
    left_out = {name: reason_to_skip(name, a) for name in peers}
    if a.device == "cpu":
        left_out |= {name: "for GPUs only" for name in variants if VARIANTS[name].gpu_only}
        left_out |= {level: "for GPUs only" for level in levels if level != "eager"}
    left_out = {name: reason for name, reason in left_out.items() if reason}
    variants, levels, peers = ([name for name in names if name not in left_out] for names in (variants, levels, peers))
    if not variants:
        raise SystemExit(f"--variants {a.variants}: none of them runs on {a.device}; eager and eager-overlap do")
    job = base_job(a) | {"cases": cases(a), "profile": known(a.profile, {*VARIANTS, *LEVELS}, "--profile")}
    ours = job | {"who": "ours", "variants": variants, "layouts": layouts(a), "single": a.single}
    again = ours | {"variants": variants[-1:], "single": False, "cases": job["cases"][:1], "profile": []}
    sets = []
    for index, link in enumerate(known(a.link, LINKS, "--link")):
        sets.append(ProcessSet(who="ours", ranks=a.gpus, link=link, job=ours))
        for name in (name for name in peers if index == 0 or not PEERS[name].alone):
            ranks = 1 if PEERS[name].alone else a.gpus
            told = job | {"who": name, "levels": levels}
            sets.append(ProcessSet(who=name, ranks=ranks, link=link, job=told, module=PEERS[name].module))
        if not a.no_repeat:
            sets.append(ProcessSet(who="ours", note=" again", ranks=a.gpus, link=link, job=again))
    return sets, [f"{name}: skipped, {reason}" for name, reason in left_out.items()]


def split_repeats(rows: list[dict], sets: list[ProcessSet]) -> tuple[list[dict], list[str]]:
    """Returns the rows without the repeated ones, and a line per repeated one: how the machine drifted."""
    kept = [row for row in rows if not sets[row["set"]].note]
    lines = []
    for row in rows:
        if row in kept or row["reference"] or "failed" in row:
            continue
        same = [x for x in kept if report.place(x) == report.place(row) and report.name(x) == report.name(row)]
        if same and "median" in same[0]:
            first, last = same[0]["median"], row["median"]
            drift = f"{first:.1f} ms at the beginning, {last:.1f} at the end ({last / first - 1:+.1%})"
            lines.append(f"Repeated: {report.name(row)}, {row['link']}: {drift}")
    return kept, lines


def main() -> None:
    a = parser().parse_args()
    sets, left_out = process_sets(a)
    size = "tiny" if a.tiny else "full size"
    what = f"One {'guided step' if a.guided else 'evaluation'}: {a.model}, {size}, {a.gpus} x {a.device}"
    print(f"# {what}: {len(sets)} process sets", flush=True)
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        outcome = run_all(sets, Path(folder), seconds=a.timeout, minutes=a.minutes)
        outcome.problems = left_out + outcome.problems
        outcome.rows, repeats = split_repeats(outcome.rows, sets)
        timed, measured_against = report.finish(outcome.rows)
    parts = [report.heading(what, outcome.about, measured_against), report.tables(timed), "\n".join(repeats)]
    report.publish("\n\n".join(filter(None, parts)), what, outcome, timed, a.out)
    if not timed:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
