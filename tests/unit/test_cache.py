"""EasyCache's rule, against a reference that is written down step by step, and where it does not apply."""

import msgspec
import pytest
import torch
from support import randn

from fastusp_backend.config import CacheRule, Settings
from fastusp_backend.errors import SettingsError
from fastusp_backend.sampling import SAMPLERS, Cache, GuidedModel

pytestmark = pytest.mark.unit

SHAPE = (2, 3, 16, 24)
MATRIX = randn(3, 3, seed=1) / 3
SIGMAS = torch.linspace(1, 0, 21)


def velocity(x: torch.Tensor, t: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """Something that changes slowly, and not in proportion to x."""
    mixed = torch.einsum("cd,bdhw->bchw", MATRIX, x)
    return share * torch.tanh(mixed) + t.view(-1, 1, 1, 1) ** 2


def rule(threshold=0.2, start=1.0, end=0.0, kind="easy") -> CacheRule:
    return CacheRule(kind=kind, threshold=threshold, start=start, end=end)


class Model:
    """velocities of prompts, which are their shares; counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, timestep, prompts):
        self.calls += 1
        return [velocity(x, timestep, share) for share in prompts]


def sampled(given: CacheRule | None, *, negative=None, together=False, agree=lambda skip: skip, sampler="euler"):
    """(latents, model, cache) of a run."""
    model = Model()
    cache = None if given is None else Cache(given, agree, together=together)
    guided = GuidedModel(velocities=model, positive=1.0, negative=negative, cfg=2.0, timestep_scale=1.0, cache=cache)
    noise = iter(randn(20, *SHAPE, seed=5))
    x = SAMPLERS[sampler].run(guided, randn(*SHAPE, seed=2), SIGMAS, noise=noise, callback=lambda state: None)
    return x, model, cache


def by_hand(threshold: float, start: float, end: float, shares: list[float], lead: int, pooled: bool):
    """Euler with the rule of EasyCache, one variable after the other."""
    x, skipped = randn(*SHAPE, seed=2), []
    x_before = out_before = norm = rate = None
    total, offsets = 0.0, None
    for i, (sigma, following) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        inside = end < sigma <= start
        small = x[..., ::8, ::8]
        outs = change = None
        if inside and x_before is not None:
            change = (small - x_before).abs().mean()
            if rate is not None:
                total += float(rate * change / norm)
                if total < threshold:
                    outs = [x + offset for offset in offsets]
                    skipped.append(i)
                else:
                    total = 0.0
        if outs is None:
            outs = [velocity(x, sigma.expand(len(x)), share) for share in shares]
            if sigma > end:
                offsets = [out - x for out in outs]
            if inside:
                led = outs[lead][..., ::8, ::8]
                if change is not None:
                    rate = (led - out_before).abs().mean() / change
                x_before, out_before = small, led
                norm = torch.stack(outs).abs().mean() if pooled else outs[lead].abs().mean()
        denoised = [x - sigma * out for out in outs]
        wanted = denoised[0] if len(outs) == 1 else denoised[1] + 2.0 * (denoised[0] - denoised[1])
        x = x + (x - wanted) / sigma * (following - sigma)
    return x, skipped


@pytest.mark.parametrize("threshold, start, end", [(0.2, 1.0, 0.0), (0.3, 0.83, 0.12), (0.5, 0.61, 0.31)])
@pytest.mark.parametrize("negative, together", [(None, False), (0.4, False), (0.4, True)])
def test_it_is_the_rule(threshold, start, end, negative, together):
    shares = [1.0] if negative is None else [1.0, negative]
    got, model, cache = sampled(rule(threshold, start, end), negative=negative, together=together)
    want, skipped = by_hand(threshold, start, end, shares, len(shares) - 1 if together else 0, together)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert skipped and (cache.evaluations, cache.skipped) == (20, len(skipped)) and model.calls == 20 - len(skipped)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["easy", "lazy"])
def test_what_skips_nothing_changes_nothing(sampler, kind):
    exact, *_ = sampled(None, negative=0.4, sampler=sampler)
    for given in (rule(0.0, kind=kind), rule(9.0, start=0.0, kind=kind), rule(9.0, 1.0, 1.0, kind=kind)):
        got, _, cache = sampled(given, negative=0.4, sampler=sampler)
        assert torch.equal(got, exact) and cache.skipped == 0


def test_a_high_threshold_skips_all_but_what_the_rule_is_made_of():
    """Two evaluations tell the ratio, and outside of start and end all are computed."""
    for given, computed in ((rule(1e9), 2), (rule(1e9, start=0.81), 4 + 2), (rule(1e9, end=0.19), 2 + 3)):
        _, model, cache = sampled(given)
        assert (model.calls, cache.skipped) == (computed, 20 - computed)


def test_one_rank_decides():
    """Whatever a rank would do by itself: it follows the answer, and counts anew where that is no."""
    asked = []
    exact, *_ = sampled(None)
    got, model, _ = sampled(rule(1e9), agree=lambda skip: bool(asked.append(skip)))
    assert torch.equal(got, exact) and model.calls == 20 and asked == [True] * 18
    _, model, _ = sampled(rule(0.0), agree=lambda skip: True)
    assert model.calls == 2


def test_comfyuis_sum_in_the_latents():
    """There the denoised image is (x + offset) (1 - sigma)."""
    cache, x, sigma = Cache(rule(1e9, kind="easy_in_place"), bool), randn(*SHAPE, seed=3), torch.tensor(0.6)
    for step in range(2):
        cache(x + step, sigma, lambda: [x])
    (got,) = cache(x, sigma, None)
    moved = x + (x - (x + 1))
    torch.testing.assert_close(x - sigma * got, moved - sigma * moved)


def test_lazycache_skips_guided_outputs_and_looks_ahead_of_its_start():
    """By the denoised image, and with what it saw before the start."""
    _, model, cache = sampled(rule(1e9, start=0.81, kind="lazy"), negative=0.4)
    assert (model.calls, cache.skipped) == (5, 15)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_counts_its_evaluations(sampler):
    _, model, cache = sampled(rule(0.3), sampler=sampler)
    assert cache.evaluations == len(SAMPLERS[sampler].evaluations(SIGMAS)) == model.calls + cache.skipped
    assert cache.skipped


def test_a_rule_by_shares_of_the_steps():
    sigmas = [1.0, 0.9, 0.5, 0.2, 0.0]
    assert Settings().cache_rule(sigmas) is None
    made = Settings(cache="easy", cache_threshold=0.3, cache_start=0.0, cache_end=1.0).cache_rule(sigmas)
    assert made == rule(0.3, 1.0, 0.0)
    made = Settings(cache="easy", cache_start=0.25, cache_end=0.625).cache_rule(sigmas)
    assert (made.start, made.end) == pytest.approx((0.9, 0.35), rel=1e-7)
    assert Settings(cache="easy").cache_rule([0.0]) == rule(Settings().cache_threshold, 0.0, 0.0)


@pytest.mark.parametrize("share, steps, step", [(0.56, 25, 14), (0.58, 50, 29), (0.68, 75, 51), (0.7, 90, 63)])
def test_a_share_that_is_a_step_is_that_step(share, steps, step):
    """0.56 of 25 steps is 14.000000000000002, whose level is below that of step 14 in float64."""
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    from_here = Settings(cache="easy", cache_threshold=1e9, cache_start=share, cache_end=1.0)
    until_here = Settings(cache="easy", cache_threshold=1e9, cache_start=0.0, cache_end=share)
    for settings, skipped in ((from_here, steps - step - 2), (until_here, step - 2)):  # two tell the ratio
        rule = settings.cache_rule(sigmas.tolist())
        assert float(sigmas[step]) in (rule.start, rule.end)
        cache = Cache(rule, bool)
        for sigma in sigmas[:-1]:
            cache(sigma * randn(*SHAPE, seed=3), sigma, lambda: [randn(*SHAPE, seed=4)])
        assert cache.skipped == skipped


@pytest.mark.parametrize(
    "wrong",
    [
        {"cache_threshold": -0.1},
        {"cache_threshold": float("nan")},
        {"cache_threshold": float("inf")},
        {"cache_start": -0.1},
        {"cache_end": 1.1},
        {"cache": "easy", "cache_start": 0.6, "cache_end": 0.5},
        {"cache_start": float("nan")},
    ],
    ids=str,
)
def test_numbers_that_make_no_rule_are_refused(wrong):
    with pytest.raises(SettingsError, match="^set cache_"):
        Settings(**wrong)
    with pytest.raises(msgspec.ValidationError, match="set cache_"):  # so is a message with them
        msgspec.convert(msgspec.to_builtins(Settings()) | wrong, Settings)


def test_the_order_of_a_span_matters_with_a_cache_alone():
    span = {"cache_start": 0.96, "cache_end": 0.95}
    assert Settings(**span).cache_rule([1.0, 0.0]) is None
    with pytest.raises(SettingsError, match=r"^set cache_end to cache_start \(0.96\) or more, or cache = off"):
        Settings(cache="first_block", **span)
