"""From velocities to the denoised image: rectified flow, classifier-free guidance and masks."""

import pytest
import torch
from support import randn

from fastusp_backend.prompt import Inpainting
from fastusp_backend.sampling import SAMPLERS, GuidedModel

pytestmark = pytest.mark.unit

SHAPE = (2, 3, 4, 5)
X = randn(*SHAPE, seed=1)
SIGMA = torch.tensor(0.6)
VELOCITIES = {"yes": randn(*SHAPE, seed=2), "no": randn(*SHAPE, seed=3)}


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, x, timestep, conditionings):
        self.calls += [(x, timestep, conditioning) for conditioning in conditionings]
        return [VELOCITIES[conditioning] for conditioning in conditionings]


def guided(velocity, **changes) -> GuidedModel:
    options = {"positive": "yes", "negative": None, "cfg": 1.0, "timestep_scale": 1.0} | changes
    return GuidedModel(velocities=velocity, **options)


def test_without_negative_the_positive_alone_is_evaluated():
    velocity = Recorder()
    got = guided(velocity, cfg=7.0)(X, SIGMA)
    torch.testing.assert_close(got, X - SIGMA * VELOCITIES["yes"])
    assert [call[2] for call in velocity.calls] == ["yes"]


@pytest.mark.parametrize("cfg", [0.0, 1.0, 3.5, -1.0])
def test_guidance(cfg):
    yes, no = X - SIGMA * VELOCITIES["yes"], X - SIGMA * VELOCITIES["no"]
    torch.testing.assert_close(guided(Recorder(), negative="no", cfg=cfg)(X, SIGMA), no + cfg * (yes - no))


def test_the_timestep_is_scaled_and_one_for_each_image():
    velocity = Recorder()
    guided(velocity, timestep_scale=1000.0)(X, SIGMA)
    torch.testing.assert_close(velocity.calls[0][1], torch.tensor([600.0, 600.0]))


def test_half_precision_velocities_give_float32():
    got = guided(lambda x, t, prompts: [VELOCITIES[c].bfloat16() for c in prompts])(X, SIGMA)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, X - SIGMA * VELOCITIES["yes"].bfloat16().float())


def inpainting(mask: torch.Tensor) -> Inpainting:
    return Inpainting(mask=mask, latent_image=randn(*SHAPE, seed=4), noise=randn(*SHAPE, seed=5))


def test_mask_zero_gives_the_latent_image_back():
    keep = inpainting(torch.zeros(1, 1, 4, 5))
    assert torch.equal(guided(Recorder(), negative="no", cfg=3.0, inpainting=keep)(X, SIGMA), keep.latent_image)


def test_mask_one_changes_nothing():
    keep = inpainting(torch.ones(1, 1, 4, 5))
    assert torch.equal(guided(Recorder(), inpainting=keep)(X, SIGMA), guided(Recorder())(X, SIGMA))


def test_the_model_sees_the_kept_part_at_its_noise_level():
    mask = (randn(2, 1, 4, 5, seed=6) > 0).float()
    keep, velocity = inpainting(mask), Recorder()
    got = guided(velocity, inpainting=keep)(X, SIGMA)
    seen, kept = velocity.calls[0][0], (mask == 0).expand(SHAPE)
    noised = SIGMA * keep.noise + (1 - SIGMA) * keep.latent_image
    assert torch.equal(seen[kept], noised[kept]) and torch.equal(seen[~kept], X[~kept])
    assert torch.equal(got[kept], keep.latent_image[kept])
    torch.testing.assert_close(got[~kept], (X - SIGMA * VELOCITIES["yes"])[~kept])


def test_a_soft_mask_mixes_before_the_model_and_after_it():
    """By its own value, both times, as ComfyUI does."""
    mask = torch.linspace(0, 1, 20).view(1, 1, 4, 5)
    keep, velocity = inpainting(mask), Recorder()
    got = guided(velocity, inpainting=keep)(X, SIGMA)
    noised = SIGMA * keep.noise + (1 - SIGMA) * keep.latent_image
    seen = mask * X + (1 - mask) * noised
    torch.testing.assert_close(velocity.calls[0][0], seen)
    denoised = seen - SIGMA * VELOCITIES["yes"]
    torch.testing.assert_close(got, mask * denoised + (1 - mask) * keep.latent_image)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_whole_loop_keeps_the_kept_part(name):
    mask = torch.zeros(1, 1, 4, 5)
    mask[..., 2:] = 1
    keep = inpainting(mask)
    model = guided(Recorder(), inpainting=keep)
    noise = iter(randn(9, *SHAPE, seed=7))
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0])
    got = SAMPLERS[name].run(model, X, sigmas, noise=noise, callback=lambda state: None)
    torch.testing.assert_close(got[..., :2], keep.latent_image[..., :2], rtol=0, atol=1e-6)
    assert (got[..., 2:] - keep.latent_image[..., 2:]).abs().mean() > 0.1
