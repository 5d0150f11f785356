"""Our FLUX.2 against diffusers' Flux2Transformer2DModel with the same weights in float32."""

from dataclasses import replace

import pytest
import torch
from support import SMALL_FLUX2, OneRank, inputs, load_model, randn, relative_difference, spec_of

from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.patchify import patchify, unpatchify
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "klein"])
def models(request, tmp_path_factory):
    config = replace(SMALL_FLUX2, guidance=request.param)
    path = tmp_path_factory.mktemp("oracle") / "flux2.safetensors"
    write_checkpoint(str(path), config, seed=5)
    ours = load_model(spec_of(path), CPU)
    # Norm scales of one would hide a mix-up of query and key.
    state = {
        ours.file_key(name): t + torch.linspace(-0.5, 0.5, len(t)) * (1 + i % 5) / 5 if name.endswith("scale") else t
        for i, (name, t) in enumerate(ours.state_dict().items())
    }
    ours.load_state_dict({ours.module_key(key): t for key, t in state.items()}, assign=True)
    theirs = diffusers.Flux2Transformer2DModel(
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        mlp_ratio=config.mlp / config.hidden,
        guidance_embeds=config.guidance,
    )
    theirs.load_state_dict(single_file.convert_flux2_transformer_checkpoint_to_diffusers(state))
    return OneRank(ours), theirs.eval()


def velocity_of(theirs, given, size, *, images=(), starts=()) -> torch.Tensor:
    """diffusers' velocity, for reference latents `images` that begin at `starts` (image, row, column)."""
    latents, places = (given.x, *images), ((0, 0, 0), *starts)
    ids = []
    for latent, (number, row, column) in zip(latents, places, strict=True):
        rows, columns = (torch.arange(n) for n in latent.shape[-2:])
        ids.append(torch.cartesian_prod(torch.tensor([number]), row + rows, column + columns, torch.tensor([0])))
    zero = torch.tensor([0])
    with torch.inference_mode():
        tokens = theirs(
            hidden_states=torch.cat([patchify(latent, 1) for latent in latents], dim=1),
            encoder_hidden_states=given.context,
            timestep=given.timestep,
            guidance=given.guidance,
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(given.context.shape[1])),
            img_ids=torch.cat(ids),
        ).sample
    return unpatchify(tokens[:, : len(ids[0])], size, 1)


CASES = [(1, (4, 4), 1), (7, (8, 6), 1), (24, (7, 9), 2), (512, (1, 3), 1)]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_velocity(models, half):
    """Half of the cases with one of the models, the others with the other."""
    denoiser, theirs = models
    for text, size, batch in CASES[half ^ (not denoiser.model.config.guidance) :: 2]:
        given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
        ours = denoiser(given.x, given.timestep, Prompt(given.context, guidance=given.guidance))
        assert relative_difference(ours, velocity_of(theirs, given, size)) < 1e-5, (text, size)


@pytest.mark.parametrize(
    "method, starts",
    [
        (None, [(10, 0, 0), (20, 0, 0), (30, 0, 0)]),
        ("index", [(10, 0, 0), (20, 0, 0), (30, 0, 0)]),
        ("offset", [(1, 0, 0), (1, 3, 0), (1, 0, 5)]),
        ("negative_index", [(1, 0, 0), (1, 3, 0), (1, 0, 5)]),  # FLUX does not know it
        ("uxo", [(0, 4, 6), (0, 7, 11), (0, 11, 13)]),
    ],
)
def test_references(models, method, starts):
    """Positions worked out by hand from ComfyUI's rules, for an image of 4 x 6 tokens."""
    denoiser, theirs = models
    given = inputs(denoiser.model.config, text=7, size=(4, 6), batch=2)
    images = tuple(randn(2, 128, *size, seed=n) for n, size in enumerate([(3, 5), (4, 2), (2, 1)]))
    prompt = Prompt(given.context, guidance=given.guidance, references=images, reference_method=method)
    denoiser.check(given.x, [prompt])
    ours = denoiser(given.x, given.timestep, prompt)
    expected = velocity_of(theirs, given, (4, 6), images=images, starts=starts)
    assert relative_difference(ours, expected) < 1e-5


def test_references_at_timestep_zero(models):
    """At timestep 0 they are as ever; later on they differ from those, and from other timesteps' references."""
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(4, 6), batch=2)
    images = tuple(randn(2, 128, *size, seed=n) for n, size in enumerate([(3, 5), (4, 2)]))
    index, zero = (
        Prompt(given.context, guidance=given.guidance, references=images, reference_method=method)
        for method in ("index", "index_timestep_zero")
    )
    for timestep in (torch.zeros(2), given.timestep):
        expected = denoiser(given.x, timestep, index).clone()
        difference = relative_difference(denoiser(given.x, timestep, zero), expected)
        assert difference > 1e-3 if timestep.any() else difference < 1e-5


def test_control(models):
    """A residual after any block reaches the output."""
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(4, 4))
    prompt = Prompt(given.context, guidance=given.guidance)
    plain = denoiser(given.x, given.timestep, prompt).clone()
    tensor = randn(1, 16, 512, seed=1)
    for places in (((0,), ()), ((None, 0), ()), ((), (0,)), ((), (None, 0))):
        got = denoiser(given.x, given.timestep, prompt, Residuals((tensor,), *places))
        assert relative_difference(got, plain) > 1e-3


def test_y_has_no_effect(models):
    """ComfyUI's nodes may give one."""
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(4, 4))
    without, other = (Prompt(given.context, y, given.guidance) for y in (None, torch.ones(1, 768)))
    denoiser.check(given.x, [other])
    plain = denoiser(given.x, given.timestep, without).clone()
    assert torch.equal(denoiser(given.x, given.timestep, other), plain)


def test_guidance_has_its_effect_on_dev_alone(models):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=7, size=(4, 4))
    weak, strong = (
        denoiser(given.x, given.timestep, Prompt(given.context, guidance=torch.tensor([g]))).clone() for g in (1.0, 4.0)
    )
    if denoiser.model.config.guidance:
        assert relative_difference(weak, strong) > 1e-3
    else:
        assert torch.equal(weak, strong)


@pytest.mark.parametrize(
    "shape, more, words",
    [
        ((1, 16, 8, 8), {}, "expected (B, 128, h, w)"),
        ((1, 128, 1, 8, 8), {}, "expected (B, 128, h, w)"),
        ((2, 128, 4, 4), {}, "expected (2, T, 64)"),
        ((1, 128, 4, 4), {"references": (torch.ones(1, 16, 4, 4),)}, "expected (1, 128, [1,] h, w)"),
        ((1, 128, 4, 4), {"concat": torch.ones(1, 128, 4, 4)}, "it takes latents alone"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(models, shape, more, words):
    denoiser, _ = models
    with pytest.raises(RequestError) as refused:
        denoiser.check(torch.ones(shape), [Prompt(randn(1, 6, 64, seed=0), **more)])
    assert words in str(refused.value)
