"""When the workers' loop is rehearsed: beside the workers' own preparation, where the last run met nothing."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.pool import Progress

pytestmark = pytest.mark.unit

SIGMAS = torch.linspace(1, 0, 3)


class Stopped(Exception):
    """As ComfyUI's own, of 0.3.64."""


class Session:
    """Notes what it is asked for; the workers' latents are ones. stopped: before the workers have the request."""

    stopped = False
    settings = SimpleNamespace(cache="off")
    model = SimpleNamespace(compute="float32")

    def __init__(self, did: list[str]):
        self.pool = SimpleNamespace(devices="cpu:2", stepped=lambda *_, **__: None)
        self.did = did

    def layout(self, evaluations):
        return "a layout"

    def sample(self, x, sigmas, *, meanwhile=lambda: None, **_):
        if self.stopped:
            raise Stopped
        self.did.append("sent")
        meanwhile()
        self.did.append("done")
        return torch.ones_like(x)


@pytest.fixture
def run(node_module):
    """run(what the rehearsal finds, cached=...) gives what happened, in order, in one more run of the same model."""
    did: list[str] = []
    finds: list[str | None] = []
    step_cache = {"cached": None}

    def in_rehearsal(*_):
        did.append("rehearsed")
        return finds.pop()

    def ends(*_, **__):
        return contextlib.nullcontext()

    module = node_module(
        "remote_loop",
        comfyui={"k_diffusion": SimpleNamespace()},
        host={"STOPPED": (Stopped,), "interruptible": ends, "progress": lambda step, **_: Progress(step=step)},
        obstacles={
            "PROMPT_FIELDS": {"c_crossattn": "context"},
            "evaluated_conditionings": lambda guider: {"positive": [guider.conditioning]},
            "in_rehearsal": in_rehearsal,
            "in_run": lambda *_: None,
            "name_in_workers": lambda function: "euler",
            "neutral": lambda function, option: 0.0,
            "text_length": lambda *_: 2,
            "timestep_scale": lambda _: 1.0,
        },
        remote_transformer={"RemoteTransformer": None},
        status={
            "node_status": None,
            "push_pools": lambda **_: None,
            "set_headline": lambda text, reason="": did.append(f"{text.split(', ')[-1]} {reason}".strip()),
        },
        step_caches={"HOLDER": "holder", "StepCache": object, "step_cache": lambda *_, **__: step_cache["cached"]},
    )

    def stepping(model, x, sigmas, extra_args, callback, disable):
        did.append("stepped")
        return x

    transformer = SimpleNamespace(session=Session(did), unobstructed=False)
    text = SimpleNamespace(process_cond=lambda **_: SimpleNamespace(cond=torch.zeros(1, 2, 4)))

    def broken(**_):
        raise AttributeError("a pack's own")

    guider = SimpleNamespace(
        inner_model=SimpleNamespace(diffusion_model=transformer, model_sampling=None),
        conditioning={"model_conds": {"c_crossattn": text}},
        model_options={},
        cfg=1.0,
    )

    def once(found: str | None = None, cached=None, seed: int | None = 1, foreign=False, stopped=False) -> list[str]:
        did.clear()
        transformer.session.stopped = stopped
        finds.append(found)
        step_cache["cached"] = cached
        guider.conditioning["model_conds"]["c_crossattn"] = SimpleNamespace(process_cond=broken) if foreign else text
        loop = module._loop_for(stepping, guider)
        given = {"model_options": {}} | ({} if seed is None else {"seed": seed})
        loop(SimpleNamespace(), torch.zeros(1, 4, 2, 2), SIGMAS, given, disable=True)
        return [*did]

    return once


FIRST = ["rehearsed", "loop in the workers", "sent", "done"]
LATER = ["loop in the workers", "sent", "rehearsed", "done"]


def test_the_workers_do_not_wait_for_a_rehearsal_where_the_last_one_found_nothing(run):
    assert run() == FIRST
    assert run() == LATER
    assert run() == LATER


def test_what_a_late_rehearsal_finds_takes_the_run_back(run):
    run()
    assert run("a pack") == [*LATER[:-1], "stepping a pack", "stepped"]
    assert run("a pack") == ["rehearsed", "stepping a pack", "stepped"], "nothing was sent in vain a second time"
    assert run() == FIRST
    assert run() == LATER


def test_a_cache_is_set_aside_before_anything_is_sent(run):
    run()
    aside = SimpleNamespace(set_aside=lambda guider, given: contextlib.nullcontext(given), rule=None)
    assert run(cached=aside) == FIRST


def test_without_a_seed_the_workers_wait_since_noise_would_be_drawn_twice(run):
    run()
    assert run(seed=None) == FIRST


def test_what_cannot_be_sent_is_rehearsed_then(run):
    """Another pack's conditioning: stepped if that is what is found, as where it is rehearsed before."""
    run()
    assert run("a pack", foreign=True) == ["loop in the workers", "rehearsed", "stepping a pack", "stepped"]
    run()
    with pytest.raises(AttributeError, match="a pack's own"):
        run(foreign=True)


def test_a_run_that_is_stopped_before_it_is_rehearsed_ends(run):
    """Whatever the rehearsal would find: stepping would go on, since ComfyUI raises its interruption once."""
    run()
    with pytest.raises(Stopped):
        run("a pack", stopped=True)
