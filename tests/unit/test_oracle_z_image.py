"""Our Z-Image against diffusers' ZImageTransformer2DModel with the same weights in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from support import SMALL_Z_IMAGE, OneRank, inputs, load_model, randn, relative_difference, spec_of

from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.models.z_image import ZImageConfig
from fastusp_backend.models.z_image_blocks import QK_EPS
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers", minversion="0.37")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
CONFIGS = {
    "four heads": SMALL_Z_IMAGE,
    "six heads": replace(SMALL_Z_IMAGE, hidden=768, heads=6, mlp=512, blocks=3),
}


def peer(config: ZImageConfig):
    """diffusers' module of these sizes, with the epsilon of queries' and keys' norms that ComfyUI has."""
    from diffusers.models.transformers.transformer_z_image import FeedForward

    theirs = diffusers.ZImageTransformer2DModel(
        in_channels=config.channels,
        dim=config.hidden,
        n_layers=config.blocks,
        n_refiner_layers=config.image_blocks,
        n_heads=config.heads,
        n_kv_heads=config.heads,
        cap_feat_dim=config.context,
    )
    for block in (*theirs.noise_refiner, *theirs.context_refiner, *theirs.layers):
        block.feed_forward = FeedForward(config.hidden, config.mlp)
        block.attention.norm_q.eps = block.attention.norm_k.eps = QK_EPS
    return theirs.eval()


def distinct(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Norms of one would hide a mix-up of two of them, and small values what a filling token is."""
    if "norm" in name:
        return tensor + torch.linspace(-0.5, 0.5, len(tensor)) * (1 + sum(map(ord, name)) % 5) / 5
    return 10 * tensor if "pad_token" in name else tensor


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    path = tmp_path_factory.mktemp("oracle") / "z_image.safetensors"
    write_checkpoint(str(path), CONFIGS[request.param], seed=5)
    ours = load_model(spec_of(path), CPU)
    state = {name: distinct(name, tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    theirs = peer(CONFIGS[request.param])
    state = {ours.file_key(name): tensor for name, tensor in state.items()}
    theirs.load_state_dict(convert_z_image_transformer_checkpoint_to_diffusers(state))
    return OneRank(ours), theirs


def velocity_of(theirs, given) -> torch.Tensor:
    """diffusers' velocity; it takes sizes that patches divide, runs from 0, noise, to 1, and the other way."""
    height, width = given.x.shape[-2:]
    x = torch.nn.functional.pad(given.x, (0, width % 2, 0, height % 2), mode="circular")
    with torch.inference_mode():
        velocity = theirs(list(x[:, :, None]), 1 - given.timestep, list(given.context)).sample
    return -torch.stack(list(velocity))[:, :, 0, :height, :width]


CASES = [(1, (2, 2), 1), (7, (16, 12), 1), (32, (16, 16), 2), (24, (7, 9), 2), (301, (10, 6), 1), (64, (24, 23), 1)]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_velocity(models, half):
    """Streams that tokens fill up, and such that 32 divides; half of them with one of the models."""
    denoiser, theirs = models
    for text, size, batch in CASES[half ^ (denoiser.model.config.heads == 6) :: 2]:
        given = inputs(denoiser.model.config, text=text, size=size, batch=batch, seed=text)
        prompt = Prompt(given.context)
        denoiser.check(given.x, [prompt])
        ours = denoiser(given.x, given.timestep, prompt)
        assert relative_difference(ours, velocity_of(theirs, given)) < 1e-5, (text, size)


@pytest.mark.any_processor  # torch's attention in this type fails where AVX-512 is there and hidden
def test_bfloat16(models):
    """Embedded timesteps are rounded as others round them."""
    ours, theirs = (copy.deepcopy(model).bfloat16() for model in (models[0].model, models[1]))
    given = inputs(ours.config, text=7, size=(16, 12))
    timestep = torch.full_like(given.timestep, 0.5)  # a bfloat16
    got = OneRank(ours, dtype=torch.bfloat16)(given.x, timestep, Prompt(given.context)).float()
    rounded = {name: getattr(given, name).bfloat16() for name in ("x", "context")}
    want = velocity_of(theirs, replace(given, timestep=timestep.bfloat16(), **rounded)).float()
    assert ((got - want).norm() / want.norm()).item() < 0.02


def test_filling_tokens_are_attended(models):
    """A text of 31 tokens and one that fills it up is not a text of 31."""
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=31, size=(8, 8))
    before = denoiser(given.x, given.timestep, Prompt(given.context)).clone()
    model = denoiser.model
    held = model.cap_pad_token.data
    try:
        model.cap_pad_token.data = -held
        assert relative_difference(denoiser(given.x, given.timestep, Prompt(given.context)), before) > 1e-3
    finally:
        model.cap_pad_token.data = held


@pytest.mark.parametrize(
    "shape, more, words",
    [
        ((1, 4, 8, 8), {}, "expected (B, 16, h, w)"),
        ((1, 16, 1, 8, 8), {}, "expected (B, 16, h, w)"),
        ((2, 16, 8, 8), {}, "expected (2, T, 64)"),
        ((1, 16, 8, 8), {"y": torch.ones(1, 32)}, "takes neither pooled text nor embedded guidance"),
        ((1, 16, 8, 8), {"guidance": torch.ones(1)}, "takes neither pooled text nor embedded guidance"),
        ((1, 16, 8, 8), {"references": (torch.ones(1, 16, 8, 8),)}, "Z-Image takes none"),
        ((1, 16, 8, 8), {"concat": torch.ones(1, 1, 8, 8)}, "it takes latents alone"),
    ],
    ids=lambda value: "".join(sorted(value)) if isinstance(value, dict) else str(value),
)
def test_what_does_not_fit_is_refused(models, shape, more, words):
    denoiser, _ = models
    with pytest.raises(RequestError) as refused:
        denoiser.model.check(torch.ones(shape), Prompt(randn(1, 6, 64, seed=0), **more))
    assert words in str(refused.value)


def test_control_nets_and_blocks_left_out_are_refused(models):
    denoiser, _ = models
    given = inputs(denoiser.model.config, text=6, size=(8, 8))
    width = denoiser.model.config.hidden
    for residuals, words in (
        (Residuals((torch.ones(1, 4, width),), (0,)), "ControlNet"),
        (Residuals(skipped=(0,)), "leaves out"),
    ):
        with pytest.raises(RequestError, match=words):
            denoiser.check(given.x, [Prompt(given.context)], residuals)
