"""Samplers against closed forms on models whose exact solution is known, in float64."""

import math

import pytest
import torch
from support import randn

from fastusp_backend.sampling import SAMPLERS

pytestmark = pytest.mark.unit

DETERMINISTIC = ("euler", "heun", "dpm_2", "dpmpp_2m", "res_multistep")
SECOND_ORDER = ("heun", "dpm_2", "dpmpp_2m", "res_multistep")
TO_ZERO = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.0], dtype=torch.float64)
SHAPE = (2, 3, 4, 5)
IMAGE = randn(*SHAPE, seed=1).double()
START = randn(*SHAPE, seed=2).double()


def run(name, model, sigmas, *, x=START, noise=(), steps=None, **options):
    steps = [] if steps is None else steps
    return SAMPLERS[name].run(model, x, sigmas, noise=iter(noise), callback=steps.append, **options)


def draws(count: int) -> torch.Tensor:
    return torch.stack([randn(*SHAPE, seed=10 + i).double() for i in range(count)])


def to_image(x, sigma):
    return IMAGE


@pytest.mark.parametrize("last", [0.0, 0.05])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_constant_image_is_reached_along_a_straight_line(name, last):
    sigmas = torch.cat([TO_ZERO[:-1], torch.tensor([last], dtype=torch.float64)])
    exact = IMAGE + (START - IMAGE) * last / sigmas[0]
    torch.testing.assert_close(run(name, to_image, sigmas), exact, rtol=0, atol=1e-12)


def test_euler_is_exact_for_a_constant_velocity():
    velocity = randn(*SHAPE, seed=3).double()
    sigmas = TO_ZERO[:-1]
    got = run("euler", lambda x, sigma: x - sigma * velocity, sigmas)
    torch.testing.assert_close(got, START + (sigmas[-1] - sigmas[0]) * velocity, rtol=0, atol=1e-12)


class Gaussian:
    """Images N(mean, width^2): the denoised image is known, and with it every trajectory of the ODE."""

    mean, width = 0.3, 0.5

    def spread(self, sigma):
        return (sigma**2 + (1 - sigma) ** 2 * self.width**2) ** 0.5

    def __call__(self, x, sigma):
        share = (1 - sigma) * self.width**2 / self.spread(sigma) ** 2
        return self.mean + share * (x - (1 - sigma) * self.mean)

    def exact(self, x, start, end):
        unit = (x - (1 - start) * self.mean) / self.spread(start)
        return (1 - end) * self.mean + self.spread(end) * unit


def error_at(name: str, steps: int) -> float:
    model = Gaussian()
    sigmas = torch.logspace(math.log10(0.95), math.log10(0.1), steps + 1, dtype=torch.float64)
    return float((run(name, model, sigmas) - model.exact(START, sigmas[0], sigmas[-1])).abs().max())


@pytest.mark.parametrize("name, order", [("euler", 1), *((name, 2) for name in SECOND_ORDER)])
def test_order_of_convergence(name, order):
    errors = [error_at(name, steps) for steps in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < 10.0 ** (-1 - order)


def test_ancestral_without_noise_is_euler():
    sigmas = TO_ZERO
    model = Gaussian()
    got = run("euler_ancestral", model, sigmas, eta=0.0)
    torch.testing.assert_close(got, run("euler", model, sigmas), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_an_ancestral_step_keeps_the_share_of_image_and_the_variance(eta):
    sigmas = torch.tensor([0.8, 0.5], dtype=torch.float64)
    old, new = torch.tensor(3.0).double(), torch.tensor(7.0).double()

    def end(old, new):
        x = 0.8 * old + 0.2 * IMAGE
        return run("euler_ancestral", to_image, sigmas, x=x, noise=[new], eta=eta) - 0.5 * IMAGE

    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(end(zero, zero), torch.zeros_like(IMAGE), rtol=0, atol=1e-12)
    from_old, from_new = end(old, zero) / old, end(zero, new) / new
    torch.testing.assert_close(from_old**2 + from_new**2, torch.full_like(IMAGE, 0.25), rtol=0, atol=1e-12)
    down = 0.5 * (1 + (0.5 / 0.8 - 1) * eta)
    torch.testing.assert_close(from_old, torch.full_like(IMAGE, 0.5 / (1 - down) * down), rtol=0, atol=1e-12)


def test_s_noise_scales_the_ancestral_noise_alone():
    sigmas = torch.tensor([0.8, 0.5], dtype=torch.float64)
    noise = draws(1)

    def end(s_noise):
        return run("euler_ancestral", to_image, sigmas, noise=noise, s_noise=s_noise)

    torch.testing.assert_close(end(2.0) - end(1.0), end(1.0) - end(0.0), rtol=0, atol=1e-12)
    assert not torch.equal(end(0.0), end(1.0))


def test_lcm_noises_the_denoised_image_anew():
    noise = draws(1)
    got = run("lcm", to_image, torch.tensor([1.0, 0.4]).double(), noise=noise)
    expected = 0.4 * noise[0] + 0.6 * IMAGE
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(run("lcm", to_image, TO_ZERO, noise=draws(4)), IMAGE)


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_ZERO[:-1], TO_ZERO[-2:], TO_ZERO[:2], TO_ZERO[:1]], ids=len)
@pytest.mark.parametrize("name, options", [*((n, {}) for n in SAMPLERS), ("euler_ancestral", {"eta": 0.0})])
def test_noise_is_drawn_as_often_as_announced(name, options, sigmas):
    announced = SAMPLERS[name].noise_draws(sigmas, options)
    taken = []

    def noise():
        for draw in draws(10):
            taken.append(draw)
            yield draw

    SAMPLERS[name].run(Gaussian(), START, sigmas, noise=noise(), callback=lambda state: None, **options)
    assert len(taken) == announced
    assert announced == 0 or name in ("lcm", "euler_ancestral")


def test_draws_announced():
    assert SAMPLERS["euler_ancestral"].noise_draws(TO_ZERO, {}) == 4
    assert SAMPLERS["euler_ancestral"].noise_draws(TO_ZERO, {"eta": 0.0}) == 0
    assert SAMPLERS["lcm"].noise_draws(TO_ZERO[:-1], {}) == 4
    assert SAMPLERS["heun"].noise_draws(TO_ZERO, {}) == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_callback_a_step_with_what_the_model_saw(name):
    seen, steps = [], []

    def model(x, sigma):
        seen.append((x.clone(), float(sigma)))
        return Gaussian()(x, sigma)

    before = START.clone()
    run(name, model, TO_ZERO, noise=draws(4), steps=steps)
    assert torch.equal(START, before)
    assert [state.index for state in steps] == list(range(len(TO_ZERO) - 1))
    assert [float(state.sigma) for state in steps] == TO_ZERO[:-1].tolist()
    assert torch.equal(steps[0].x, START)
    for state in steps:
        assert torch.equal(state.denoised, Gaussian()(state.x, state.sigma))
        assert any(sigma == float(state.sigma) and torch.equal(x, state.x) for x, sigma in seen)
    assert len(seen) == (2 * len(steps) - 1 if name in ("heun", "dpm_2") else len(steps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_empty_schedule_returns_its_input(name):
    assert torch.equal(run(name, to_image, TO_ZERO[:1]), START)
