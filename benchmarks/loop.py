"""What sampling through a pool costs beside the evaluations: the loop in the workers, and remote evaluations.

    python benchmarks/loop.py --model flux --gpus 2 --out NAME

Compares a bare evaluation (step.py's) with the steps of prompts on a warm pool, as the workers and as the client see
them: the first prompt, a second one of the same shape, one of a new shape, then evaluation by evaluation.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import report
import torch
from common import CONFIGS, Case, random_inputs
from files import write_model
from process_sets import LINKS, ProcessSet, run_all
from step import TEXTS, add_common, base_job, known, layouts
from variants import VARIANTS

from fastusp_backend.cli.table import Column, fitted
from fastusp_backend.config import Layout, ModelSpec
from fastusp_backend.devices import Devices
from fastusp_backend.pool import Pool, Progress, Session
from fastusp_backend.prompt import Prompt


@dataclass
class Watch:
    """One prompt as the client sees it, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    arrived: list[float] = field(default_factory=list)
    """From its start to each step."""
    inside: list[float] = field(default_factory=list)
    """Of each step, in the workers."""
    total: float = 0.0

    def step(self, event, _tensors) -> None:
        self.arrived.append(time.perf_counter() - self.started)
        self.inside.append(event.seconds)

    def end(self) -> None:
        self.total = time.perf_counter() - self.started

    @property
    def steady(self) -> tuple[float, float]:
        """Returns the median ms of a step in the workers, and between arrivals at the client, less the first two."""
        between = [b - a for a, b in zip(self.arrived[1:], self.arrived[2:], strict=False)]
        return 1000 * statistics.median(self.inside[2:]), 1000 * statistics.median(between)

    @property
    def summary(self) -> str:
        first, second, third = (f"{1000 * s:.0f}" for s in self.inside[:3])
        return f"{self.total:.2f} s; first three steps {first}, {second}, {third} ms"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(made)
    made.add_argument("--size", type=int, default=1024, help="edge of the image in pixels")
    made.add_argument(
        "--text", type=int, help="token count; default 512 FLUX and Chroma, 256 Qwen-Image, 154 SD3, 128 Z-Image"
    )
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--variant", help="default: overlap, on CPU ranks eager-overlap")
    made.add_argument("--file", type=Path, help="model file, written if it is not there; default: a temporary one")
    made.set_defaults(guided=False, layouts=None)
    return made


def measure_pool(session: Session, a: argparse.Namespace) -> list[tuple[str, str, float | None]]:
    """Runs everything; returns lines of (what, figure, ms to compare with a bare evaluation)."""
    config, dtype = CONFIGS[a.model, a.tiny], torch.bfloat16 if a.device == "cuda" else torch.float32

    def given(text: int) -> tuple[torch.Tensor, Prompt]:
        made = random_inputs(config, Case(size=a.size, texts=(text,), batch=1), torch.device("cpu"), dtype)
        tensors = made.prompts[0]
        return made.x, Prompt(tensors.context, tensors.y, tensors.guidance)

    def sample(text: int) -> Watch:
        x, prompt = given(text)
        watch = Watch()
        sigmas = torch.linspace(1, 0, a.steps + 1)
        session.sample(x, sigmas, sampler="euler", positive=prompt, progress=Progress(step=watch.step))
        watch.end()
        return watch

    first, second, third = sample(a.text), sample(a.text), sample(a.text // 2 + 3)
    inside, outside = second.steady
    total = 1000 * second.total / a.steps
    lines = [
        ("first prompt: start, load, compile, capture", first.summary, None),
        ("second prompt, same shape", second.summary, None),
        ("third prompt, new shape", third.summary, None),
        ("a step of the second prompt, in the workers", f"{inside:.2f} ms", inside),
        ("the same, between arrivals at the client", f"{outside:.2f} ms", outside),
        ("the second prompt's time over its steps", f"{total:.2f} ms", total),
    ]
    x, prompt = given(a.text)
    for label in ("new timesteps", "timesteps seen before"):
        times = []
        for t in torch.linspace(0.99, 0.01, a.steps):
            began = time.perf_counter()
            session.evaluate(x, t[None], prompt, Progress())
            times.append(1000 * (time.perf_counter() - began))
        median = statistics.median(times)
        lines.append((f"remote evaluation, {label}", f"{median:.2f} ms", median))
    return lines


def main() -> None:
    a = parser().parse_args()
    a.variant = a.variant or ("overlap" if a.device == "cuda" else "eager-overlap")
    a.text = a.text or int(TEXTS[a.model])
    known(a.variant, VARIANTS, "--variant")
    (link,) = known(a.link, LINKS, "--link")
    layout = layouts(a)[0]
    case = {"size": a.size, "texts": [a.text], "batch": 1}
    job = base_job(a) | {"who": "ours", "cases": [case], "variants": [a.variant], "layouts": [layout], "profile": []}
    bare = ProcessSet(who="ours", ranks=a.gpus, link=link, job=job | {"single": False})
    with tempfile.TemporaryDirectory(prefix="fastusp-bench-") as folder:
        outcome = run_all([bare], Path(folder), seconds=a.timeout, minutes=a.minutes)
        timed, _ = report.finish(outcome.rows)
        if not timed:
            raise SystemExit("the bare evaluation was not measured")
        path = a.file or Path(folder) / "model.safetensors"
        if not path.exists():
            dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
            write_model(path, CONFIGS[a.model, a.tiny], torch.device(a.device), dtype)
        compute = "bfloat16" if a.device == "cuda" else "float32"
        spec = ModelSpec.of_file(str(path), storage=None, compute=compute)
        os.environ.update(LINKS[link])  # the pool's processes inherit it
        pool = Pool(Devices(ranks=a.gpus, gpus=tuple(range(a.gpus)) if a.device == "cuda" else ()))
        try:
            lines = measure_pool(Session(pool, spec, (Layout(**layout),), VARIANTS[a.variant].settings), a)
        finally:
            pool.close()
    step = timed[0]["median"]
    body = [("bare evaluation", f"{step:.2f} ms", "")]
    body += [
        (what, figure, "" if ms is None else f"{ms - step:+.2f} ms, {ms / step - 1:+.1%}") for what, figure, ms in lines
    ]
    size = "tiny" if a.tiny else "full size"
    what = f"Sampling through a pool: {a.model}, {size}, {a.size} px, text {a.text}, {a.gpus} x {a.device}, {a.variant}"
    text = (
        report.heading(what, outcome.about)
        + "\n\n"
        + fitted([*map(Column, ("what", "time", "over bare"))], body, markdown=True)
    )
    rows = [*timed, *({"what": what, "figure": figure} for what, figure, _ in lines)]
    report.publish(text, what, outcome, rows, a.out)


if __name__ == "__main__":
    main()
