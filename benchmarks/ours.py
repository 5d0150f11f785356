"""FastUSP's own evaluations, as the workers run them."""

import functools
from collections.abc import Callable, Iterator

import torch
from common import Case, Inputs, random_inputs
from storages import STORAGES
from variants import VARIANTS, Variant

from fastusp_backend.comm.mesh import Mesh, make_mesh, single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout
from fastusp_backend.engine import Denoiser
from fastusp_backend.models.family import Transformer
from fastusp_backend.weights.stored import Stored

Run = Callable[[], torch.Tensor]


def evaluation(model: Transformer, mesh: Mesh, transport: Transport, variant: Variant, given: Inputs, dtype) -> Run:
    """Returns a run of one step's evaluations, () -> velocities (prompts, B, C, h, w)."""
    if variant.settings.linear == "fp8":
        model = held_by_rows(model)
    if variant.storage:
        model = held(model, lambda stored: STORAGES[variant.storage](stored.data))
    denoiser = Denoiser(model, mesh, transport, variant.settings, dtype)
    denoiser.check(given.x, given.prompts)
    timesteps = given.timestep[None].to(given.x.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        if variant.every_step:
            for prompt in given.prompts:
                active = model.modulation_input(timesteps, prompt, dtype)
                torch.cat([layer(active) for layer in model.modulations()], dim=-1)
        return torch.stack(denoiser(given.x, given.timestep, given.prompts, lambda: None))

    return run


def held_by_rows(model: Transformer) -> Transformer:
    """Returns the same model with weights for products in fp8."""
    return held(model, Stored.by_rows)


def held(model: Transformer, how: Callable[[Stored], Stored]) -> Transformer:
    """Returns the same model with other weights in the blocks' products; all others are the same tensors."""
    with torch.device("meta"):
        made = model.config.build()
    made.load_state_dict(model.state_dict(), assign=True)
    for layer in made.products():
        layer.stored = how(layer.stored)
    return made.eval()


def runs(job: dict, model: Transformer, dtype, device) -> Iterator[tuple[dict, Callable[[], Run]]]:
    """Yields each configuration of a job, described, with what makes its run. One rank's eager one comes first: the
    others are compared with it."""
    meshes = [make_mesh(Layout(**layout), device) for layout in job["layouts"]]
    places = [(mesh, Transport(mesh)) for mesh in meshes]
    alone = single_rank_mesh(device)
    own = alone, Transport(alone)
    for case in (Case(**case) for case in job["cases"]):
        given = random_inputs(model.config, case, device, dtype)
        configurations = [(*own, "eager", True)]
        configurations += [(*place, name, False) for place in places for name in job["variants"]]
        configurations += [(*own, job["variants"][-1], False)] if job["single"] else []
        for mesh, transport, name, reference in configurations:
            row = {"case": case, "config": name, "ranks": mesh.layout.ranks, "reference": reference}
            row["lossy"] = VARIANTS[name].lossy
            row |= {"layout": str(mesh.layout), "transport": transport.kind}
            yield row, functools.partial(evaluation, model, mesh, transport, VARIANTS[name], given, dtype)
