"""A rehearsal sees who reads what the workers' loop does not know. (What is called in it: test_call_tracer.)"""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.unit


class Obstacle(BaseException):
    pass


@pytest.fixture
def rehearsal(node_module):
    return node_module(
        "rehearsal",
        provenance={"owner": lambda value: type(value).__module__, "packs_naming": lambda text: ["the-pack"]},
        call_tracer={"CallTracer": None, "Obstacle": Obstacle},
        comfyui={"samplers": SimpleNamespace()},
        reachable={"Unchanged": None},
    )


def fail(text):
    raise Obstacle(text)


@pytest.fixture
def observed(rehearsal):
    """observed(values) gives a dict of which `known` alone may be read."""
    return lambda values: rehearsal._Observed(values, {"known"}, "on the model", fail)


READS = [
    lambda d: d["foreign"],
    lambda d: d.get("foreign"),
    lambda d: "foreign" in d,
    lambda d: d.pop("foreign"),
    lambda d: d.setdefault("foreign", 2),
    list,
    lambda d: d.copy(),
    lambda d: d.values(),
    lambda d: d.items(),
    lambda d: {**d},
]


@pytest.mark.parametrize("read", READS)
def test_reading_what_is_not_known_is_an_obstacle(observed, read):
    with pytest.raises(Obstacle, match=r"^foreign \(the-pack\) on the model$"):
        read(observed({"known": 1, "foreign": 1}))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("nothing", [None, {}, [], ()])
def test_what_says_nothing_may_be_read(observed, read, nothing):
    read(observed({"known": 1, "foreign": nothing}))


def test_what_is_known_or_absent_may_be_read(observed):
    values = observed({"known": 1, "foreign": 2, "strength": 1.0})
    assert values["known"] == 1 and values.get("absent", 3) == 3 and values["strength"] == 1.0
    with pytest.raises(Obstacle, match="^strength"):
        observed({"strength": 0.5})["strength"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_text_that_nobody_looks_at_is_not_carried_along(rehearsal, masked):
    """8 MB of FLUX.1's; what a pack left on it is. A mask counts the tokens of the whole."""
    text = SimpleNamespace(cond=torch.randn(1, 512, 8), changed=abs)
    conds = {"c_crossattn": text, "y": 1} | ({"attention_mask": 2} if masked else {})
    guider = SimpleNamespace(conds={"positive": [{"model_conds": conds, "foreign": 1}], "negative": None})
    given = guider.conds
    with rehearsal._observed_conditionings(guider, ["positive"], fail):
        (part,) = guider.conds["positive"]
        carried = part["model_conds"]["c_crossattn"]
        assert carried.cond.shape == (1, 512 if masked else 1, 8) and carried.changed is abs
        assert part["model_conds"].keys() == conds.keys()
        with pytest.raises(Obstacle):
            part["foreign"]
    assert guider.conds is given and text.cond.shape == (1, 512, 8)
