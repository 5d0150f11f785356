"""Every sampler that the host lists gives stock's latents; what the workers cannot loop, the host steps."""

import pytest
from comfy import PromptFailed
from test_host_parity import LOOP_SAMPLERS
from workflows import IN_WORKERS, STEPPING, TOLERANCE, Graph, difference

pytestmark = pytest.mark.host


def sampled(host, model: str, name: str, **inputs):
    """(latents, status lines) of a short run, or (None, the host's error)."""
    graph = Graph()
    sampler = graph.sample(getattr(graph, model)(), sampler_name=name, seed=7, **inputs)
    saved = graph.save(sampler)
    try:
        outcome = host.run(graph)
    except PromptFailed as error:
        return None, [error.text]
    return outcome.latents[saved], outcome.texts_of(sampler[0])


def check(host, names, **inputs) -> None:
    wrong = []
    for name in names:
        want, error = sampled(host, "stock", name, **inputs)
        got, said = sampled(host, "usp", name, **inputs)
        if want is None or got is None:
            if got is not want or said != error:
                wrong.append(f"{name}: stock {error}, ours {said}")
            continue
        nowhere = want.isnan()
        if nowhere.any():
            if not nowhere.equal(got.isnan()):
                wrong.append(f"{name}: NaN in other places than stock's")
        elif not difference(got, want) <= TOLERANCE:
            wrong.append(f"{name}: {difference(got, want):.1e}")
        where = IN_WORKERS if name in LOOP_SAMPLERS else STEPPING
        if not any(where in text for text in said):
            wrong.append(f"{name}: not {where!r} but {said}")
    assert not wrong, "\n".join(wrong)


def test_every_sampler_of_the_host(host):
    (names, *_) = host.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"]
    assert {*LOOP_SAMPLERS, "test_midpoint"} < set(names)
    check(host, names, steps=4)


@pytest.mark.any_host
def test_a_sampler_and_a_scheduler_of_another_pack(host):
    check(host, ("test_midpoint", "euler"), steps=3, scheduler="test_squares")


def test_some_with_guidance(host):
    check(host, ("dpmpp_2m", "uni_pc", "euler_cfg_pp"), steps=3, cfg=2.0)
