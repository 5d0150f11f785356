"""Every sampler that the host lists gives stock's latents; what the workers cannot loop, the host steps."""

import pytest
from comfy import PromptFailed
from test_host_parity import LOOP_SAMPLERS
from workflows import IN_WORKERS, STEPPING, TOLERANCE, Graph, difference

pytestmark = pytest.mark.host


def sampled(host, models: tuple[str, ...], name: str, **inputs) -> list:
    """Short runs of `stock` or `usp` models in one prompt: (latents, status lines) of each, or (None, the host's
    error)."""
    graph = Graph()
    runs = [graph.sample(getattr(graph, model)(), sampler_name=name, seed=7, **inputs) for model in models]
    saved = [graph.save(run) for run in runs]
    try:
        outcome = host.run(graph)
    except PromptFailed as error:
        return [(None, [error.text])] * len(models)
    return [(outcome.latents[node], outcome.texts_of(run[0])) for node, run in zip(saved, runs, strict=True)]


def check(host, names, **inputs) -> None:
    wrong = []
    for name in names:
        (want, error), (got, said) = sampled(host, ("stock", "usp"), name, **inputs)
        if want is None:  # which of them failed, and in what words?
            (want, error), (got, said) = (sampled(host, (model,), name, **inputs)[0] for model in ("stock", "usp"))
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
        where = IN_WORKERS if name in LOOP_SAMPLERS else f"FastUSP: {STEPPING}no {name} in the workers"
        if not any(where in text for text in said):
            wrong.append(f"{name}: not {where!r} but {said}")
    assert not wrong, "\n".join(wrong)


def test_every_sampler_of_the_host(host):
    (names, *_) = host.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"]
    assert {*LOOP_SAMPLERS, "test_midpoint"} < set(names)
    check(host, [name for name in names if name not in LOOP_SAMPLERS], steps=2)  # those have a test of their own


@pytest.mark.any_host
def test_a_sampler_and_a_scheduler_of_another_pack(host):
    check(host, ("test_midpoint", "euler"), steps=3, scheduler="test_squares")


def test_some_with_guidance(host):
    check(host, ("dpmpp_2m", "uni_pc", "euler_cfg_pp"), steps=3, cfg=2.0)
