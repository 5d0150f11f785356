"""What the lossy options cost in exactness: full-size random weights, plain and with outlier channels as trained ones.

    python benchmarks/quality.py --model flux --ranks 2

Prints per layout and option the relative (Frobenius) error of one evaluation at three timesteps, and of the latents
after all steps of Euler's method, against one rank that runs eagerly and exactly. Then what the options, and caches at
several thresholds, do to pictures of the small model that is shipped: their difference in dB, the share of captions
that they meet, and the steps that were skipped. Ranks may share a GPU: this measures exactness, not speed.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import paths
import torch
import torch.distributed as dist
from common import CONFIGS, MODELS, Case, random_inputs, random_model, shipped_model
from ours import held_by_rows
from PIL import Image, ImageDraw

from fastusp_backend import shapes
from fastusp_backend.attention import sage
from fastusp_backend.attention.lossy import installed
from fastusp_backend.cli.table import Column, Table
from fastusp_backend.cli.verify import with_caches
from fastusp_backend.comm.mesh import make_mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.environment import inherited
from fastusp_backend.models.family import Transformer
from fastusp_backend.prompt import Prompt
from fastusp_backend.sampling import SAMPLERS, Cache, GuidedModel

OF_OURS = "FASTUSP_QUALITY"
"""Set for the ranks that are started here, whatever launcher surrounds all."""
TOGETHER = 50
"""Pictures that are drawn at a time."""
SHOWN, CELL, MAGNIFIED = 4, 128, 8
"""Of the sheet: pictures in a row, the edge of each in pixels, and how much their differences are magnified."""
TIMESTEPS = (0.95, 0.6, 0.2)
OPTIONS = {
    "exact": {},
    "fp8 wire": {"wire": "fp8"},
    "int8 wire": {"wire": "int8"},
    "fp8 products": {"linear": "fp8"},
    "fp8 wire, fp8 products": {"wire": "fp8", "linear": "fp8"},
    "int8 wire, fp8 products": {"wire": "int8", "linear": "fp8"},
}


def options(device: str, ring: int) -> dict[str, dict[str, str]]:
    """Returns what is compared: on GPUs also attention in 8 bits, as far as its packages are installed and, of a ring,
    give what it needs."""
    attentions = installed() if device == "cuda" else []
    if ring > 1 and "sage" in attentions and not sage.gives_lse():
        attentions.remove("sage")
    both = [name for name, option in OPTIONS.items() if len(option) > 1]
    return OPTIONS | {
        name: option
        for attention in attentions
        for name, option in (
            (f"attention {attention}", {"attention": attention}),
            *((f"attention {attention}, {name}", OPTIONS[name] | {"attention": attention}) for name in both),
        )
    }


def add_outliers(model: Transformer, *, share: float = 0.003, factor: float = 30.0) -> None:
    """Makes a few channels of the residual streams large, and a few dimensions of keys: what block products write
    there is multiplied by `factor`."""
    hidden = model.config.hidden
    generator = torch.Generator().manual_seed(7)
    channels = torch.randperm(hidden, generator=generator)[: max(1, int(share * hidden))]
    for layer in model.products():
        if len(layer.weight) == hidden:
            layer.weight.data[channels] *= factor
    for name, parameter in model.named_parameters():
        if "key_norm" in name or "norm_k" in name or "norm_added_k" in name:
            parameter.data[torch.randperm(len(parameter), generator=generator)[:4]] *= 6


def _chosen(options: dict[str, dict], a: argparse.Namespace) -> dict[str, dict]:
    return {name: of for name, of in options.items() if name == "exact" or name.startswith(a.only)}


def table(steps: int) -> Table:
    heads = "weights", "layout", "option", f"t = {', '.join(map(str, TIMESTEPS))}"
    return Table(*map(Column, heads), Column(f"after {steps} steps", format=".1e"), markdown=True)


def rank(a: argparse.Namespace) -> None:
    cuda = a.device == "cuda"
    number = int(os.environ["RANK"])
    device = torch.device("cuda", number % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")  # ranks that share a GPU have no NCCL
    world, dtype = dist.get_world_size(), torch.bfloat16 if cuda else torch.float32
    layouts = [Layout(ulysses=u, ring=world // u) for u in range(1, world + 1) if world % u == 0]
    places = [(mesh, Transport(mesh)) for mesh in (make_mesh(layout, device) for layout in layouts)]
    alone = single_rank_mesh(device)
    config = CONFIGS[a.model, a.tiny]
    given = random_inputs(config, Case(a.size, (a.text,), 1), device, dtype)
    (prompt,) = given.prompts

    @torch.inference_mode()
    def results(model, mesh, transport, settings: Settings) -> list[torch.Tensor]:
        denoiser = Denoiser(model, mesh, transport, settings, dtype)

        def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return denoiser(x, config.timestep_scale * timestep, [prompt], lambda: None)[0].float()

        found = [velocity(given.x, torch.tensor([t])) for t in TIMESTEPS]
        x, sigmas = given.x.float(), torch.linspace(1, 0, a.steps + 1)
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            x = x + (after - now).item() * velocity(x, now[None])
        return [*found, x]

    for weights in ("N(0, 1 / fan_in)", "with outlier channels"):
        model = random_model(config, device, dtype)
        if "outlier" in weights:
            add_outliers(model)
        eager = Settings(compile=False, cuda_graphs=False, overlap=False)
        wanted = results(model, alone, Transport(alone), eager)
        rows = held_by_rows(model)
        for mesh, transport in places:
            for name, option in _chosen(options(a.device, mesh.layout.ring), a).items():
                held = rows if option.get("linear") == "fp8" else model
                found = results(held, mesh, transport, Settings(**option))
                errors = [((f - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]
                if number == 0:
                    at = " ".join(f"{error:.1e}" for error in errors[:-1])
                    print(table(a.steps).row(weights, str(mesh.layout), name, at, errors[-1]), flush=True)
        del model, rows, wanted
    if number == 0:
        print(f"\n{picture_table().head()}", flush=True)
    pictures(a, places, alone, dtype)
    dist.destroy_process_group()


def picture_table() -> Table:
    numbers = Column("pictures, dB", format=".1f"), Column("captions met", format=".1%")
    return Table(Column("layout"), Column("option"), *numbers, Column("skipped", format=".0%"), markdown=True)


@torch.inference_mode()
def pictures(a: argparse.Namespace, places: list, alone, dtype: torch.dtype) -> None:
    """Draws `a.captions` pictures of the shipped model in every way; the first rank prints and saves."""
    captions, number = shapes.examples(a.captions), dist.get_rank()
    model = shipped_model(alone.device, dtype)
    rows = held_by_rows(model)

    def all_numbers(numbers: list[float]) -> list[list[float]]:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, numbers)
        return every

    def drawn(held: Transformer, mesh, transport, settings: Settings) -> tuple[torch.Tensor, float]:
        """(pictures, the share of evaluations that were skipped)."""
        denoiser, found, asked, skipped = Denoiser(held, mesh, transport, settings, dtype), [], 0, 0
        sigmas = torch.linspace(1, 0, a.steps + 1)
        rule = settings.cache_rule(sigmas.tolist())
        for start in range(0, len(captions), TOGETHER):
            tensors = shapes.prompt(captions[start : start + TOGETHER]).tensors()
            prompt = Prompt.from_tensors({name: t.to(alone.device, dtype) for name, t in tensors.items()}, None)
            noise = torch.randn(len(prompt.context), 16, 32, 32, generator=torch.Generator().manual_seed(start))
            easy = first_block = None
            if rule is not None and rule.kind == "first_block":
                first_block = denoiser.first_block_cache(rule, 1.0, all_numbers)
            elif rule is not None:
                easy = Cache(rule, lambda skip: bool(all_numbers([float(skip)])[0][0]))

            def velocities(x, timestep, prompts, cache=first_block):
                return denoiser(x, timestep, prompts, lambda: None, cache=cache)

            more = {"negative": None, "cfg": 1.0, "timestep_scale": 1.0}
            model = GuidedModel(velocities=velocities, positive=prompt, cache=easy, **more)
            run = SAMPLERS["euler"].run
            x = run(model, noise.to(alone.device), sigmas, noise=iter(()), callback=lambda state: None)
            found.append(shapes.decode(x).cpu())
            if cache := easy or first_block:
                asked, skipped = asked + cache.evaluations, skipped + cache.skipped
        return torch.cat(found), skipped / max(1, asked)

    def told(layout: str, name: str, found: torch.Tensor, wanted: torch.Tensor, skipped: float = 0) -> None:
        met = sum(not shapes.unmet(caption, picture) for caption, picture in zip(captions, found, strict=True))
        differences = ((found - wanted)[:SHOWN].abs() * MAGNIFIED).clamp(max=1)
        sheet.append((f"{layout}: {name}", torch.cat([found[:SHOWN], differences])))
        row = picture_table().row(layout, name, shapes.psnr(found, wanted), met / len(captions), skipped or None)
        print(row, flush=True)

    sheet: list[tuple[str, torch.Tensor]] = []
    eager = Settings(compile=False, cuda_graphs=False, overlap=False)
    wanted, _ = drawn(model, alone, Transport(alone), eager)
    if number == 0:
        told("1 rank", "exact, eager", wanted, wanted)
    for mesh, transport in places:
        for name, option in _chosen(with_caches(options(a.device, mesh.layout.ring)), a).items():
            held = rows if option.get("linear") == "fp8" else model
            found, skipped = drawn(held, mesh, transport, Settings(**option))
            if number == 0:
                told(str(mesh.layout), name, found, wanted, skipped)
    if number == 0 and a.sheet:
        last = f"{places[-1][0].layout}: "
        contact_sheet([sheet[0], *(row for row in sheet if row[0].startswith(last))]).save(a.sheet)


def contact_sheet(rows: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """rows: labels, and pictures (B, 3, h, w) from 0 to 1, which are shown at CELL pixels below the label."""
    label = 18
    sheet = Image.new("RGB", (len(rows[0][1]) * CELL, len(rows) * (CELL + label)), "white")
    for i, (text, pictures) in enumerate(rows):
        small = torch.nn.functional.interpolate(pictures, (CELL, CELL), mode="area")
        pixels = (torch.cat([*small], dim=-1) * 255).round().byte().movedim(0, -1).numpy()
        ImageDraw.Draw(sheet).text((4, i * (CELL + label) + 3), text, fill="black")
        sheet.paste(Image.fromarray(pixels), (0, i * (CELL + label) + label))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--captions", type=int, default=200, help="pictures of the shipped model (default 200)")
    parser.add_argument("--only", default="", help="the options whose names begin so, beside exact values")
    parser.add_argument("--sheet", type=Path, help="where to save some of them, and differences")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    if OF_OURS in os.environ:
        return rank(a)
    name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    print(f"{a.model}, {a.ranks} ranks, {name}, torch {torch.__version__}, {a.size} px, text {a.text}, {a.steps} steps")
    print(table(a.steps).head(), flush=True)
    env = inherited(os.environ, paths.ROOT) | {OF_OURS: "1"}
    if a.device == "cuda" and torch.cuda.device_count() < a.ranks:
        env["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={a.ranks}"]
    sys.exit(subprocess.run([*command, __file__, *sys.argv[1:]], env=env).returncode)


if __name__ == "__main__":
    main()
