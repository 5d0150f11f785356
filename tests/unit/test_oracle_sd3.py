"""Our Stable Diffusion 3 against diffusers' SD3Transformer2DModel with the same weights in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from support import SMALL_SD3, OneRank, inputs, load_model, randn, relative_difference, spec_of

from fastusp_backend.errors import RequestError
from fastusp_backend.models.family import Residuals
from fastusp_backend.models.sd3 import SD3Config
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
CONFIGS = {
    "medium": SMALL_SD3,  # 3.5 medium: a second attention in the first blocks
    "large": replace(SMALL_SD3, second_attentions=0),
    "3": replace(SMALL_SD3, second_attentions=0, normed=False),
}


def peer(config: SD3Config):
    """diffusers' module of these sizes."""
    return diffusers.SD3Transformer2DModel(
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=config.blocks,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        caption_projection_dim=config.hidden,
        pooled_projection_dim=config.pooled,
        pos_embed_max_size=config.positions,
        dual_attention_layers=tuple(range(config.second_attentions)),
        qk_norm="rms_norm" if config.normed else None,
    ).eval()


def distinct(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Norms of one would hide a mix-up of query and key, and small positions one of their order."""
    if ".ln_" in name:
        return tensor + torch.linspace(-0.5, 0.5, len(tensor)) * (1 + sum(map(ord, name)) % 5) / 5
    return 50 * tensor if name == "pos_embed" else tensor


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("oracle") / "sd3.safetensors"
    write_checkpoint(str(path), config, seed=5)
    ours = load_model(spec_of(path), CPU)
    state = {name: distinct(name, tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    theirs = peer(config)
    theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(state)))
    return OneRank(ours), theirs


def velocity_of(theirs, given, *, pooled=None, **more) -> torch.Tensor:
    """diffusers' velocity; it takes sizes that patches divide, and timesteps from 0 to 1000, as we do."""
    height, width = given.x.shape[-2:]
    x = torch.nn.functional.pad(given.x, (0, width % 2, 0, height % 2), mode="circular")
    with torch.inference_mode():
        velocity = theirs(
            hidden_states=x,
            encoder_hidden_states=given.context,
            pooled_projections=given.y if pooled is None else pooled,
            timestep=given.timestep,
            **more,
        ).sample
    return velocity[..., :height, :width]


def example(config: SD3Config, *, text: int, size: tuple[int, int], batch: int = 1):
    return inputs(config, text=text, size=size, batch=batch, seed=text)


@pytest.mark.parametrize(
    "text, size, batch",
    [(1, (2, 2), 1), (7, (16, 12), 1), (24, (7, 9), 2), (301, (10, 6), 1), (154, (24, 23), 1)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_velocity(models, text, size, batch):
    """Up to as many rows and columns of patches as there are positions."""
    denoiser, theirs = models
    given = example(denoiser.model.config, text=text, size=size, batch=batch)
    prompt = Prompt(given.context, given.y)
    denoiser.check(given.x, [prompt])
    ours = denoiser(given.x, given.timestep, prompt)
    assert relative_difference(ours, velocity_of(theirs, given)) < 1e-5


def test_bfloat16(models):
    """Embedded timesteps and pooled text are rounded as others round them."""
    ours, theirs = (copy.deepcopy(model).bfloat16() for model in (models[0].model, models[1]))
    given = example(ours.config, text=7, size=(16, 12))
    timestep = torch.full_like(given.timestep, 500.0)  # a bfloat16
    got = OneRank(ours, dtype=torch.bfloat16)(given.x, timestep, Prompt(given.context, given.y)).float()
    rounded = {name: getattr(given, name).bfloat16() for name in ("x", "context", "y")}
    want = velocity_of(theirs, replace(given, timestep=timestep.bfloat16(), **rounded)).float()
    assert ((got - want).norm() / want.norm()).item() < 0.02


def test_without_pooled_text(models):
    """Nothing is added to the timestep's embedding then, as in ComfyUI: other than for zeros."""
    denoiser, theirs = models
    given = example(denoiser.model.config, text=7, size=(8, 8), batch=2)
    ours = denoiser(given.x, given.timestep, Prompt(given.context)).clone()
    embedder = theirs.time_text_embed.text_embedder
    last, embedder.linear_2 = (
        embedder.linear_2,
        torch.nn.Linear(denoiser.model.config.hidden, embedder.linear_2.out_features),
    )
    torch.nn.init.zeros_(embedder.linear_2.weight)
    torch.nn.init.zeros_(embedder.linear_2.bias)
    try:
        assert relative_difference(ours, velocity_of(theirs, given)) < 1e-5
    finally:
        embedder.linear_2 = last
    zeros = denoiser(given.x, given.timestep, Prompt(given.context, torch.zeros_like(given.y)))
    assert relative_difference(ours, zeros) > 1e-4


@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1), (2,)], ids=str)
def test_blocks_are_left_out(models, skipped):
    denoiser, theirs = models
    given = example(denoiser.model.config, text=7, size=(8, 9), batch=2)
    prompt = Prompt(given.context, given.y)
    ours = denoiser(given.x, given.timestep, prompt, Residuals(skipped=skipped)).clone()
    assert relative_difference(ours, velocity_of(theirs, given, skip_layers=skipped)) < 1e-5
    assert relative_difference(ours, denoiser(given.x, given.timestep, prompt)) > 1e-3


def test_all_blocks_are_left_out(models):
    denoiser, theirs = models
    given = example(denoiser.model.config, text=7, size=(8, 8))
    ours = denoiser(given.x, given.timestep, Prompt(given.context, given.y), Residuals(skipped=(0, 1, 2)))
    assert relative_difference(ours, velocity_of(theirs, given, skip_layers=[0, 1, 2])) < 1e-5


@pytest.mark.parametrize("skipped", [(), (1,), (0,)], ids=str)
def test_control(models, skipped):
    """Residuals after every block but the last, to which diffusers adds none, left out or not."""
    denoiser, theirs = models
    config = denoiser.model.config
    given = example(config, text=7, size=(8, 7), batch=2)
    tensors = tuple(randn(2, 16, config.hidden, seed=n) for n in range(2))
    prompt, residuals = Prompt(given.context, given.y), Residuals(tensors, (), (0, 1), skipped)
    denoiser.check(given.x, [prompt], residuals)
    ours = denoiser(given.x, given.timestep, prompt, residuals)
    more = {"block_controlnet_hidden_states": [*tensors, torch.zeros_like(tensors[0])], "skip_layers": skipped}
    assert relative_difference(ours, velocity_of(theirs, given, **more)) < 1e-5


def test_the_last_blocks_residual_counts(models):
    """As in ComfyUI: it is as if the last layer took so much more."""
    denoiser, _ = models
    given = example(denoiser.model.config, text=7, size=(8, 8))
    prompt, tensor = Prompt(given.context, given.y), randn(1, 16, denoiser.model.config.hidden, seed=1)
    plain = denoiser(given.x, given.timestep, prompt).clone()
    last = denoiser(given.x, given.timestep, prompt, Residuals((tensor,), (), (None, None, 0)))
    assert relative_difference(last, plain) > 1e-2


@pytest.mark.parametrize(
    "shape, more, words",
    [
        ((1, 4, 8, 8), {}, "expected (B, 16, h, w)"),
        ((1, 16, 1, 8, 8), {}, "expected (B, 16, h, w)"),
        ((2, 16, 8, 8), {}, "expected (2, T, 64)"),
        ((1, 16, 8, 25), {}, "up to 192 x 192 pixels"),
        ((1, 16, 8, 8), {"y": torch.ones(1, 31)}, "expected (1, 32)"),
        ((1, 16, 8, 8), {"y": torch.ones(2, 32)}, "expected (1, 32)"),
        ((1, 16, 8, 8), {"guidance": torch.ones(1)}, "takes no embedded guidance"),
        ((1, 16, 8, 8), {"references": (torch.ones(1, 16, 8, 8),)}, "Stable Diffusion 3 takes none"),
    ],
    ids=lambda value: "".join(sorted(value)) if isinstance(value, dict) else str(value),
)
def test_what_does_not_fit_is_refused(models, shape, more, words):
    denoiser, _ = models
    with pytest.raises(RequestError) as refused:
        denoiser.model.check(torch.ones(shape), Prompt(randn(1, 6, 64, seed=0), **more))
    assert words in str(refused.value)
