"""Our FLUX against diffusers' FluxTransformer2DModel with the same weights in float32."""

from dataclasses import replace

import pytest
import torch
from support import inputs, relative_difference, spec_of

from benchmarks.diffusers_weights import to_diffusers
from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.models.family import Conditioning
from fastusp_backend.models.loading import load_model
from fastusp_backend.models.patches import patchify, unpatchify
from fastusp_backend.models.synthetic import TINY_FLUX, write_flux

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def models(request, tmp_path_factory):
    config = replace(TINY_FLUX, guidance=request.param)
    path = tmp_path_factory.mktemp("oracle") / "flux.safetensors"
    write_flux(str(path), config, seed=5)
    ours = load_model(spec_of(path), CPU)
    # Norm scales of one would hide a mix-up of query and key.
    state = {
        ours.file_key(name): t + torch.linspace(-0.5, 0.5, len(t)) * (1 + i % 5) / 5 if name.endswith("scale") else t
        for i, (name, t) in enumerate(ours.state_dict().items())
    }
    ours.load_state_dict({ours.module_key(key): t for key, t in state.items()}, assign=True)
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=128,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        pooled_projection_dim=config.pooled,
        guidance_embeds=config.guidance,
    )
    theirs.load_state_dict(to_diffusers(state, config.hidden))
    mesh = single_rank_mesh(CPU)
    return Denoiser(ours, mesh, Transport(mesh), Settings(), torch.float32), theirs.eval()


@pytest.mark.parametrize(
    "text, size, batch",
    [(1, (8, 8), 1), (7, (16, 12), 1), (24, (7, 9), 2), (301, (10, 6), 1), (512, (4, 4), 1)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_velocity(models, text, size, batch):
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
    ours = denoiser(given.x, given.timestep, Conditioning(given.context, given.y, given.guidance))
    grid = -(-size[0] // 2), -(-size[1] // 2)
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    with torch.inference_mode():
        tokens = theirs(
            hidden_states=patchify(given.x),
            encoder_hidden_states=given.context,
            pooled_projections=given.y,
            timestep=given.timestep,
            guidance=given.guidance if denoiser.model.config.guidance else None,
            txt_ids=torch.zeros(text, 3),
            img_ids=image_ids.float(),
        ).sample
    expected = unpatchify(tokens, grid)[..., : size[0], : size[1]]
    assert relative_difference(ours, expected) < 1e-5
