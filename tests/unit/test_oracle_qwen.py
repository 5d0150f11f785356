"""Our Qwen-Image against diffusers' QwenImageTransformer2DModel with the same weights in float32."""

import pytest
import torch
from support import inputs, randn, relative_difference, spec_of

from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Conditioning
from fastusp_backend.models.loading import load_model
from fastusp_backend.models.patches import patch_grid, patchify, unpatchify
from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_qwen_image

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class ComfyRope(torch.nn.Module):
    """Rotations by ComfyUI's positions, which differ from diffusers' in the middle of an odd number of patches: n // 2
    there, n - n // 2 here. Even numbers agree, and are compared with diffusers' own."""

    def forward(self, img_shapes, max_txt_seq_len, device):
        _, *grid = img_shapes[0][0]
        rows, columns = (torch.arange(n) - n // 2 for n in grid)
        image = torch.cartesian_prod(torch.tensor([0]), rows, columns)
        start = max(grid) // 2
        return self.turns(image), self.turns(torch.arange(start, start + max_txt_seq_len)[:, None].expand(-1, 3))

    @staticmethod
    def turns(positions: torch.Tensor) -> torch.Tensor:
        angles = [
            positions[:, axis, None].double() / 10_000 ** (torch.arange(0, dim, 2).double() / dim)
            for axis, dim in enumerate((16, 56, 56))
        ]
        return torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, -1)).to(torch.complex64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    config = TINY_QWEN_IMAGE
    path = tmp_path_factory.mktemp("oracle") / "qwen.safetensors"
    write_qwen_image(str(path), config, seed=5)
    ours = load_model(spec_of(path), CPU)
    # Norm weights of one would hide a mix-up of query and key.
    state = {
        name: t + torch.linspace(-0.5, 0.5, len(t)) * (1 + i % 5) / 5 if "norm" in name and t.dim() == 1 else t
        for i, (name, t) in enumerate(ours.state_dict().items())
    }
    ours.load_state_dict(state, assign=True)
    theirs = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=config.channels,
        num_layers=config.blocks,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
    )
    theirs.load_state_dict(state)
    mesh = single_rank_mesh(CPU)
    return Denoiser(ours, mesh, Transport(mesh), Settings(), torch.float32), theirs.eval()


@pytest.mark.parametrize("text", [6, 35, 301])
@pytest.mark.parametrize(
    "size, batch",
    [((8, 8), 1), ((16, 12), 2), ((7, 15), 1), ((10, 6), 1), ((13, 9), 2)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_velocity(models, text, size, batch):
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
    ours = denoiser(given.x, given.timestep, Conditioning(given.context))
    grid = patch_grid(*size)
    own_rope = theirs.pos_embed
    if any(n % 2 for n in grid):
        theirs.pos_embed = ComfyRope()
    try:
        with torch.inference_mode():
            tokens = theirs(
                hidden_states=patchify(given.x),
                encoder_hidden_states=given.context,
                timestep=given.timestep,
                img_shapes=[[(1, *grid)]] * batch,
            ).sample
    finally:
        theirs.pos_embed = own_rope
    expected = unpatchify(tokens, grid)[..., : size[0], : size[1]]
    assert relative_difference(ours, expected) < 1e-5


def test_a_frame_axis_comes_back(models):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=6, size=(7, 8), batch=2)
    prompt = Conditioning(given.context)
    flat = denoiser(given.x, given.timestep, prompt).clone()
    assert torch.equal(denoiser(given.x[:, :, None], given.timestep, prompt), flat[:, :, None])


@pytest.mark.parametrize(
    "shape, more, words",
    [
        ((1, 16, 4, 8, 8), {}, "4 layers: Qwen-Image-Layered"),
        ((1, 4, 8, 8), {}, "(B, 16, [1,] h, w)"),
        ((1, 16, 8), {}, "(B, 16, [1,] h, w)"),
        ((2, 16, 8, 8), {}, "expected (2, T, 3584)"),
        ((1, 16, 8, 8), {"guidance": torch.ones(1)}, "neither pooled text nor embedded guidance"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(models, shape, more, words):
    denoiser, _ = models
    with pytest.raises(RequestError) as refused:
        denoiser.model.check(torch.ones(shape), Conditioning(randn(1, 6, 3584, seed=0), **more))
    assert words in str(refused.value)
