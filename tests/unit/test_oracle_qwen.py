"""Our Qwen-Image against diffusers' QwenImageTransformer2DModel with the same weights in float32."""

from dataclasses import replace

import pytest
import torch
from support import OneRank, inputs, load_model, randn, relative_difference, spec_of

from fastusp_backend.engine.modulations import CACHED_ROWS
from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.patchify import patch_grid, patchify, unpatchify
from fastusp_backend.models.synthetic import TINY_QWEN_IMAGE, write_checkpoint
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class ComfyRope(torch.nn.Module):
    """Rotations by ComfyUI's positions, which differ from diffusers' in the middle of an odd number of patches: n // 2
    there, n - n // 2 here; and where references are larger than the image: text begins behind the image there, behind
    the largest of all here. The rest agrees, and is compared with diffusers' own."""

    def forward(self, img_shapes, max_txt_seq_len, device):
        images = []
        for number, (_, *grid) in enumerate(img_shapes[0]):
            rows, columns = (torch.arange(n) - n // 2 for n in grid)
            images.append(torch.cartesian_prod(torch.tensor([number]), rows, columns))
        image = torch.cat(images)
        start = max(img_shapes[0][0][1:]) // 2
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
    write_checkpoint(str(path), config, seed=5)
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
    return OneRank(ours), theirs.eval()


def velocity_of(theirs, given, size, *, images=(), **more) -> torch.Tensor:
    """diffusers' velocity, with reference latents `images`."""
    latents = (given.x, *images)
    grids = [patch_grid(*latent.shape[-2:], 2) for latent in latents]
    with torch.inference_mode():
        tokens = theirs(
            hidden_states=torch.cat([patchify(latent, 2) for latent in latents], dim=1),
            encoder_hidden_states=given.context,
            timestep=given.timestep,
            img_shapes=[[(1, *grid) for grid in grids]] * len(given.x),
            **more,
        ).sample
    count = grids[0][0] * grids[0][1]
    return unpatchify(tokens[:, :count], grids[0], 2)[..., : size[0], : size[1]]


@pytest.fixture
def comfy_rope(models):
    """The models again, diffusers' with ComfyUI's positions."""
    denoiser, theirs = models
    own, theirs.pos_embed = theirs.pos_embed, ComfyRope()
    yield denoiser, theirs
    theirs.pos_embed = own


@pytest.mark.parametrize("text", [6, 35, 301])
@pytest.mark.parametrize(
    "size, batch",
    [((8, 8), 1), ((16, 12), 2), ((7, 15), 1), ((10, 6), 1), ((13, 9), 2)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_velocity(models, request, text, size, batch):
    odd = any(n % 2 for n in patch_grid(*size, 2))
    denoiser, theirs = request.getfixturevalue("comfy_rope") if odd else models
    given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
    ours = denoiser(given.x, given.timestep, Prompt(given.context))
    assert relative_difference(ours, velocity_of(theirs, given, size)) < 1e-5


@pytest.fixture
def zeroed(models):
    """The models again, diffusers' with references at timestep 0."""
    denoiser, theirs = models
    theirs.zero_cond_t = True
    for block in theirs.transformer_blocks:
        block.zero_cond_t = True
    yield denoiser, theirs
    theirs.zero_cond_t = False
    for block in theirs.transformer_blocks:
        block.zero_cond_t = False


REFERENCES = ((8, 4), (4, 11))
"""Sizes whose numbers of patches are even, and no larger than the image's: diffusers counts text from the largest."""


@pytest.mark.parametrize("method", [None, "index", "index_timestep_zero"])
def test_references(models, request, method):
    denoiser, theirs = request.getfixturevalue("zeroed") if method == "index_timestep_zero" else models
    given = inputs(denoiser.model.config, text=6, size=(8, 12), batch=2)
    images = tuple(randn(2, 16, *size, seed=n) for n, size in enumerate(REFERENCES))
    framed = tuple(image[:, :, None] for image in images)
    prompt = Prompt(given.context, references=framed, reference_method=method)
    denoiser.check(given.x[:, :, None], [prompt])
    denoiser.prepare([0.7], [prompt])
    for _ in range(2):
        ours = denoiser(given.x[:, :, None], given.timestep, prompt).squeeze(2)
        assert relative_difference(ours, velocity_of(theirs, given, (8, 12), images=images)) < 1e-5


@pytest.mark.parametrize("sizes", [((20, 8),), ((4, 4), (9, 26)), ((30, 30), (6, 5))], ids=str)
def test_references_larger_than_the_image(comfy_rope, sizes):
    """Text begins behind the image all the same."""
    denoiser, theirs = comfy_rope
    given = inputs(denoiser.model.config, text=6, size=(8, 12))
    images = tuple(randn(1, 16, *size, seed=n) for n, size in enumerate(sizes))
    ours = denoiser(given.x, given.timestep, Prompt(given.context, references=images, reference_method="index"))
    assert relative_difference(ours, velocity_of(theirs, given, (8, 12), images=images)) < 1e-5


def test_timestep_zero_lasts_over_more_timesteps_than_are_kept(zeroed):
    denoiser, theirs = zeroed
    given = inputs(denoiser.model.config, text=2, size=(4, 4))
    image = randn(1, 16, 4, 4, seed=1)
    prompt = Prompt(given.context, references=(image,), reference_method="index_timestep_zero")
    steps = CACHED_ROWS + 6
    table, all_images = denoiser._modulations, [slice(None)]
    reserved = table.probe_memory(2 * steps, [prompt], all_images).nbytes
    denoiser.prepare([0.5 + n / 200 for n in range(steps)], [prompt])
    for timestep in torch.linspace(0.4, 0.1, steps).unsqueeze(1):
        memory = {
            row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in table._rows[prompt].values()
        }
        assert sum(memory.values()) == reserved
        ours = denoiser(given.x, timestep, prompt)
    last = replace(given, timestep=timestep)
    assert relative_difference(ours, velocity_of(theirs, last, (4, 4), images=(image,))) < 1e-5


def test_negative_index_and_offset(models):
    """diffusers knows neither; a single reference at image 1 is where both `offset` and `index` put it."""
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=6, size=(8, 8))
    image = randn(1, 16, 6, 5, seed=1)

    def velocity(method, *images):
        prompt = Prompt(given.context, references=images, reference_method=method)
        return denoiser(given.x, given.timestep, prompt).clone()

    one = velocity("index", image)
    assert torch.equal(velocity("offset", image), one) and torch.equal(velocity("uxo", image), one)
    assert relative_difference(velocity("negative_index", image), one) > 1e-3
    assert relative_difference(velocity("offset", image, image), velocity("index", image, image)) > 1e-3


def test_control(models):
    """Residuals after every block; the last one reaches the output."""
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=6, size=(8, 8), batch=2)
    tensors = tuple(randn(2, 16, 512, seed=n) for n in range(2))
    prompt = Prompt(given.context)
    ours = denoiser(given.x, given.timestep, prompt, Residuals(tensors, (0, 1)))
    expected = velocity_of(theirs, given, (8, 8), controlnet_block_samples=tensors)
    assert relative_difference(ours, expected) < 1e-5


def test_a_frame_axis_comes_back(models):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=6, size=(7, 8), batch=2)
    prompt = Prompt(given.context)
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
        denoiser.model.check(torch.ones(shape), Prompt(randn(1, 6, 3584, seed=0), **more))
    assert words in str(refused.value)
