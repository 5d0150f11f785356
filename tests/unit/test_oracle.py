"""Our FLUX against diffusers' FluxTransformer2DModel with the same weights in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from support import OneRank, inputs, load_model, randn, relative_difference, spec_of

from benchmarks.diffusers_weights import to_diffusers
from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.flux import FluxConfig
from fastusp_backend.models.patchify import patch_grid, patchify, unpatchify
from fastusp_backend.models.synthetic import TINY_FLUX, write_checkpoint
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def peer(config: FluxConfig):
    """diffusers' module of these sizes."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * (config.channels + config.concat_channels),
        out_channels=4 * config.channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=128,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        pooled_projection_dim=config.pooled,
        guidance_embeds=config.guidance,
    ).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def models(request, tmp_path_factory):
    config = replace(TINY_FLUX, guidance=request.param)
    path = tmp_path_factory.mktemp("oracle") / "flux.safetensors"
    write_checkpoint(str(path), config, seed=5)
    ours = load_model(spec_of(path), CPU)
    # Norm scales of one would hide a mix-up of query and key.
    state = {
        ours.file_key(name): t + torch.linspace(-0.5, 0.5, len(t)) * (1 + i % 5) / 5 if name.endswith("scale") else t
        for i, (name, t) in enumerate(ours.state_dict().items())
    }
    ours.load_state_dict({ours.module_key(key): t for key, t in state.items()}, assign=True)
    theirs = peer(config)
    theirs.load_state_dict(to_diffusers(state, config.hidden))
    return OneRank(ours), theirs


def velocity_of(theirs, config, given, size, *, images=(), starts=(), **more) -> torch.Tensor:
    """diffusers' velocity, for reference latents `images` that begin at `starts` (image, row, column)."""
    latents, places = (given.x, *images), ((0, 0, 0), *starts)
    ids = []
    for latent, (number, row, column) in zip(latents, places, strict=True):
        rows, columns = patch_grid(*latent.shape[-2:], 2)
        ids.append(torch.cartesian_prod(torch.tensor([number]), torch.arange(rows), torch.arange(columns)))
        ids[-1] += torch.tensor([0, row, column])
    with torch.inference_mode():
        tokens = theirs(
            hidden_states=torch.cat([patchify(latent, 2) for latent in latents], dim=1),
            encoder_hidden_states=given.context,
            pooled_projections=given.y,
            timestep=given.timestep,
            guidance=given.guidance if config.guidance else None,
            txt_ids=torch.zeros(given.context.shape[1], 3),
            img_ids=torch.cat(ids).float(),
            **more,
        ).sample
    return unpatchify(tokens[:, : len(ids[0])], patch_grid(*size, 2), 2)[..., : size[0], : size[1]]


CASES = [(1, (8, 8), 1), (7, (16, 12), 1), (24, (7, 9), 2), (301, (10, 6), 1), (512, (4, 4), 1)]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_velocity(models, half):
    """Half of the cases with one of the models, the others with the other."""
    denoiser, theirs = models
    config = denoiser.model.config
    for text, size, batch in CASES[half ^ (not config.guidance) :: 2]:
        given = inputs(config, text=text, size=size, batch=batch, seed=text)
        ours = denoiser(given.x, given.timestep, Prompt(given.context, given.y, given.guidance))
        assert relative_difference(ours, velocity_of(theirs, config, given, size)) < 1e-5, (text, size)


def test_a_missing_pooled_text_counts_as_zeros(models):
    """As ComfyUI has it: some nodes make conditionings of text tokens alone."""
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=7, size=(8, 8), batch=2)
    prompt = Prompt(given.context, None, given.guidance)
    denoiser.check(given.x, [prompt])
    ours = denoiser(given.x, given.timestep, prompt)
    zeros = replace(given, y=torch.zeros_like(given.y))
    assert relative_difference(ours, velocity_of(theirs, denoiser.model.config, zeros, (8, 8))) < 1e-5


def test_bfloat16_rounds_guidance_as_others_do(models):
    """3500 is no bfloat16; the timestep's 500 is."""
    config = models[0].model.config
    ours, theirs = (copy.deepcopy(model).bfloat16() for model in (models[0].model, models[1]))
    given = inputs(config, text=7, size=(16, 12))
    prompt = Prompt(given.context, given.y, torch.tensor([3.5]))
    got = OneRank(ours, dtype=torch.bfloat16)(given.x, torch.tensor([0.5]), prompt).float()
    rounded = {name: getattr(given, name).bfloat16() for name in ("x", "context", "y", "guidance")}
    rounded["timestep"] = torch.tensor([0.5], dtype=torch.bfloat16)
    want = velocity_of(theirs, config, replace(given, **rounded), (16, 12)).float()
    assert ((got - want).norm() / want.norm()).item() < 0.02


@pytest.mark.parametrize(
    "method, starts",
    [
        (None, [(1, 0, 0), (1, 3, 0), (1, 0, 5)]),
        ("negative_index", [(1, 0, 0), (1, 3, 0), (1, 0, 5)]),  # FLUX does not know it
        ("index", [(1, 0, 0), (2, 0, 0), (3, 0, 0)]),
        ("uxo", [(0, 4, 6), (0, 7, 11), (0, 11, 13)]),
    ],
)
def test_references(models, method, starts):
    """Positions worked out by hand from ComfyUI's rules, for an image of 4 x 6 patches."""
    denoiser, theirs = models
    config, batch = denoiser.model.config, 2
    given = inputs(config, text=7, size=(8, 12), batch=batch)
    images = tuple(randn(batch, 16, *size, seed=n) for n, size in enumerate([(6, 10), (7, 4), (4, 2)]))
    prompt = Prompt(given.context, given.y, given.guidance, references=images, reference_method=method)
    denoiser.check(given.x, [prompt])
    ours = denoiser(given.x, given.timestep, prompt)
    expected = velocity_of(theirs, config, given, (8, 12), images=images, starts=starts)
    assert relative_difference(ours, expected) < 1e-5


def test_control(models):
    """Residuals after every block, as a ControlNet gives them."""
    denoiser, theirs = models
    config = denoiser.model.config
    given = inputs(config, text=7, size=(8, 7), batch=2)
    tensors = tuple(randn(2, 16, config.hidden, seed=n) for n in range(4))
    prompt = Prompt(given.context, given.y, given.guidance)
    ours = denoiser(given.x, given.timestep, prompt, Residuals(tensors, (0, 1), (2, 3))).clone()
    more = {"controlnet_block_samples": tensors[:2], "controlnet_single_block_samples": tensors[2:]}
    assert relative_difference(ours, velocity_of(theirs, config, given, (8, 7), **more)) < 1e-5
    # Fewer than the blocks, more than the blocks, one for two, for a part of the tokens, for every image.
    first = tensors[0][:1, :5]
    short = denoiser(given.x, given.timestep, prompt, Residuals((first,), (0, None, 0), (0,))).clone()
    padded = torch.cat([first, torch.zeros(1, 11, config.hidden)], dim=1).expand(2, -1, -1)
    zeros = torch.zeros_like(padded)
    more = {"controlnet_block_samples": [padded, zeros], "controlnet_single_block_samples": [padded, zeros]}
    assert relative_difference(short, velocity_of(theirs, config, given, (8, 7), **more)) < 1e-5


@pytest.mark.parametrize("channels", [16, 80], ids=["Canny", "Fill"])
def test_further_channels(channels, tmp_path):
    config = replace(TINY_FLUX, concat_channels=channels, double_blocks=1, single_blocks=1)
    path = tmp_path / "fill.safetensors"
    write_checkpoint(str(path), config, seed=6)
    ours = load_model(spec_of(path), CPU)
    state = {ours.file_key(name): t for name, t in ours.state_dict().items()}
    theirs = peer(config)
    theirs.load_state_dict(to_diffusers(state, config.hidden))
    given = inputs(config, text=7, size=(7, 8), batch=2)
    concat = randn(2, channels, 7, 8, seed=9)
    denoiser = OneRank(ours)
    prompt = Prompt(given.context, given.y, given.guidance, concat)
    denoiser.check(given.x, [prompt])
    got = denoiser(given.x, given.timestep, prompt)
    joined = replace(given, x=torch.cat([given.x, concat], dim=1))
    assert relative_difference(got, velocity_of(theirs, config, joined, (7, 8))) < 1e-5


@pytest.mark.parametrize(
    "more, words",
    [
        ({"references": (torch.ones(1, 16, 4, 4),)}, "a reference latent (1, 16, 4, 4) does not fit"),
        ({"references": (torch.ones(2, 4, 4, 4),)}, "expected (2, 16, [1,] h, w)"),
        ({"references": (torch.ones(2, 16, 3, 4, 4),)}, "expected (2, 16, [1,] h, w)"),
        ({"reference_method": "nearest"}, "reference method 'nearest' is not one of: offset, index"),
        ({"references": (torch.ones(2, 16, 4, 4),), "reference_method": "index_timestep_zero"}, "offset, index or uxo"),
        ({"concat": torch.ones(2, 80, 8, 8)}, "it takes latents alone"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(models, more, words):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(8, 8), batch=2)
    with pytest.raises(RequestError) as refused:
        denoiser.check(given.x, [Prompt(given.context, given.y, given.guidance, **more)])
    assert words in str(refused.value)


@pytest.mark.parametrize("shape", [(2, 17, 512), (3, 16, 512), (2, 16, 256), (16, 512), (1, 0, 512)], ids=str)
def test_control_of_another_model_is_refused(models, shape):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(8, 8), batch=2)
    prompt = Prompt(given.context, given.y, given.guidance)
    denoiser.check(given.x, [prompt], Residuals((torch.ones(2, 16, 512),), (0,)))
    with pytest.raises(RequestError, match="Was it made for another model"):
        denoiser.check(given.x, [prompt], Residuals((torch.ones(shape),), (0,)))
