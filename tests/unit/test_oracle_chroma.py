"""Our Chroma against diffusers' ChromaTransformer2DModel with the same weights in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from support import SMALL_CHROMA, OneRank, inputs, load_model, randn, relative_difference, spec_of

from benchmarks.diffusers_weights import to_diffusers
from fastusp_backend.errors import RequestError
from fastusp_backend.models.chroma import NUMBERS, ChromaConfig
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.patchify import patch_grid, patchify, unpatchify
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def peer(config: ChromaConfig):
    """diffusers' module of these sizes, which counts the last norm's vectors as ComfyUI does: as those of a model with
    all blocks."""
    theirs = diffusers.ChromaTransformer2DModel(
        in_channels=4 * config.channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        approximator_hidden_dim=config.approximator,
    ).eval()
    embedder = theirs.time_text_embed
    whole = type(embedder)(num_channels=16, out_dim=NUMBERS).mod_proj
    embedder.mod_proj = torch.cat([whole[: config.vectors - 2], whole[-2:]])
    return theirs


@pytest.fixture(scope="module", params=[(2, 2), (1, 3)], ids=str)
def models(request, tmp_path_factory):
    double, single = request.param
    config = replace(SMALL_CHROMA, double_blocks=double, single_blocks=single, mlp=4 * SMALL_CHROMA.hidden)
    path = tmp_path_factory.mktemp("oracle") / "chroma.safetensors"
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


def velocity_of(theirs, given, **more) -> torch.Tensor:
    """diffusers' velocity."""
    size = given.x.shape[-2:]
    rows, columns = patch_grid(*size, 2)
    with torch.inference_mode():
        tokens = theirs(
            hidden_states=patchify(given.x, 2),
            encoder_hidden_states=given.context,
            timestep=given.timestep,
            txt_ids=torch.zeros(given.context.shape[1], 3),
            img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float(),
            **more,
        ).sample
    return unpatchify(tokens, (rows, columns), 2)[..., : size[0], : size[1]]


CASES = [(1, (8, 8), 1), (7, (16, 12), 1), (24, (7, 9), 2), (301, (10, 6), 1), (512, (4, 4), 1)]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_velocity(models, half):
    """Half of the cases with one of the models, the others with the other."""
    denoiser, theirs = models
    for text, size, batch in CASES[half ^ (denoiser.model.config.double_blocks == 1) :: 2]:
        given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
        prompt = Prompt(given.context)
        denoiser.check(given.x, [prompt])
        ours = denoiser(given.x, given.timestep, prompt)
        assert relative_difference(ours, velocity_of(theirs, given)) < 1e-5, (text, size)


@pytest.mark.parametrize("kept", [1, 6, 11])
def test_a_text_without_its_padding_is_as_good_as_a_mask(models, kept):
    """ComfyUI encodes a prompt without padding, or with the little that a node asks for, and masks nothing; diffusers
    pads and masks."""
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=12, size=(7, 8), batch=2)
    mask = torch.ones(2, 12 + 16, dtype=torch.bool)
    mask[:, kept:12] = False
    ours = denoiser(given.x, given.timestep, Prompt(given.context[:, :kept])).clone()
    assert relative_difference(ours, velocity_of(theirs, given, attention_mask=mask)) < 1e-5
    assert relative_difference(ours, velocity_of(theirs, given)) > 1e-3


def test_guidance(models):
    """0 where nothing is said. diffusers knows no other: there its embedding is changed."""
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=7, size=(8, 8), batch=2)
    zero, two = (
        denoiser(given.x, given.timestep, Prompt(given.context, guidance=torch.tensor(value))).clone()
        for value in ([0.0], [2.0, 2.0])
    )
    assert torch.equal(zero, denoiser(given.x, given.timestep, Prompt(given.context)))
    changed = copy.deepcopy(theirs)
    changed.time_text_embed.guidance_proj.forward = lambda zeros: theirs.time_text_embed.time_proj(zeros + 2000)
    assert relative_difference(two, velocity_of(changed, given)) < 1e-5
    assert relative_difference(two, zero) > 1e-3


def test_pooled_text_has_no_effect(models):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(8, 8))
    without, other = (Prompt(given.context, y) for y in (None, torch.ones(1, 768)))
    denoiser.check(given.x, [other])
    expected = denoiser(given.x, given.timestep, without).clone()
    assert torch.equal(denoiser(given.x, given.timestep, other), expected)


def test_bfloat16(models):
    """Embedded timesteps, numbers and guidance are rounded as others round them."""
    ours, theirs = (copy.deepcopy(model).bfloat16() for model in (models[0].model, models[1]))
    theirs.time_text_embed.mod_proj = models[1].time_text_embed.mod_proj
    given = inputs(ours.config, text=7, size=(16, 12))
    timestep = torch.tensor([0.5])  # 500 is a bfloat16
    got = OneRank(ours, dtype=torch.bfloat16)(given.x, timestep, Prompt(given.context)).float()
    rounded = {name: getattr(given, name).bfloat16() for name in ("x", "context")}
    want = velocity_of(theirs, replace(given, timestep=timestep.bfloat16(), **rounded)).float()
    assert ((got - want).norm() / want.norm()).item() < 0.02


def test_control(models):
    """Residuals after every block, as a ControlNet gives them."""
    denoiser, theirs = models
    config = denoiser.model.config
    given = inputs(config, text=7, size=(8, 7), batch=2)
    double, single = config.double_blocks, config.single_blocks
    tensors = tuple(randn(2, 16, config.hidden, seed=n) for n in range(double + single))
    residuals = Residuals(tensors, tuple(range(double)), tuple(range(double, double + single)))
    prompt = Prompt(given.context)
    denoiser.check(given.x, [prompt], residuals)
    ours = denoiser(given.x, given.timestep, prompt, residuals)
    more = {"controlnet_block_samples": tensors[:double], "controlnet_single_block_samples": tensors[double:]}
    assert relative_difference(ours, velocity_of(theirs, given, **more)) < 1e-5


@pytest.mark.parametrize(
    "shape, more, words",
    [
        ((1, 4, 8, 8), {}, "expected (B, 16, h, w)"),
        ((2, 16, 8, 8), {}, "expected (2, T, 64). Was it made by the text encoders of another model? Chroma takes"),
        ((1, 16, 8, 8), {"references": (torch.ones(1, 16, 8, 8),)}, "Chroma takes none"),
        ((1, 16, 8, 8), {"concat": torch.ones(1, 16, 8, 8)}, "it takes latents alone"),
        ((1, 16, 8, 8), {"guidance": torch.ones(3)}, "the guidance (3,) does not fit"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else str(value),
)
def test_what_does_not_fit_is_refused(models, shape, more, words):
    denoiser, _ = models
    with pytest.raises(RequestError) as refused:
        denoiser.model.check(torch.ones(shape), Prompt(randn(1, 6, 64, seed=0), **more))
    assert words in str(refused.value)
