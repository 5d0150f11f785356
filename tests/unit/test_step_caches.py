"""ComfyUI's EasyCache and LazyCache on a model: which the workers' loop takes, and what it hides from a rehearsal."""

from types import SimpleNamespace

import pytest
import torch

import fastusp_backend.sampling  # noqa: F401 - the nodes take it as a part of their own package

pytestmark = pytest.mark.unit

X = torch.zeros(1, 16, 8, 8)
KINDS = SimpleNamespace(CALC_COND_BATCH="calc", DIFFUSION_MODEL="model", PREDICT_NOISE="noise", OUTER_SAMPLE="outer")


@pytest.fixture
def module(node_module):
    return node_module(
        "step_caches",
        comfyui={"WrappersMP": KINDS},
        provenance={"code_of": lambda f: f.__code__, "from_extras": lambda code: "comfy_extras" in code.co_filename},
    )


def function(name: str, file: str = "/ComfyUI/comfy_extras/nodes_easycache.py"):
    scope = {}
    exec(compile(f"def {name}(): pass", file, "exec"), scope)
    return scope[name]


def options(**changes) -> dict:
    """The model options of a sampler behind EasyCache."""
    holder = {"name": "EasyCache", "reuse_threshold": 0.2, "start_t": 0.9, "end_t": torch.tensor(0.05)}
    holder |= {"subsample_factor": 8, "verbose": False, "output_channels": 16, "total_steps_skipped": 0}
    wrappers = {
        "outer": {"easycache": [function("easycache_sample_wrapper")]},
        "calc": {"easycache": [function("easycache_calc_cond_batch_wrapper")], "other": [print]},
        "model": {"easycache": [function("easycache_forward_wrapper")]},
    }
    return {"transformer_options": {"easycache": SimpleNamespace(**holder | changes), "wrappers": wrappers}}


def lazy() -> dict:
    given = options(name="LazyCache")
    wrappers = given["transformer_options"]["wrappers"] = {"outer": {"lazycache": [print]}}
    wrappers["noise"] = {"lazycache": [function("lazycache_predict_noise_wrapper")]}
    return given


def test_the_rule_of_a_node(module):
    found = module.step_cache(options(), X, converted=True)
    assert (found.rule.kind, found.rule.threshold) == ("easy", 0.2)
    assert (found.rule.start, found.rule.end) == pytest.approx((0.9, 0.05))
    assert module.step_cache(options(), X, converted=False).rule.kind == "easy_in_place"
    assert module.step_cache(lazy(), X, converted=False).rule.kind == "lazy"
    found.tell(7)
    assert found.holder.total_steps_skipped == 7


@pytest.mark.parametrize("changes", [{"verbose": True}, {"subsample_factor": 4}, {"output_channels": 4}], ids=str)
def test_a_node_that_does_more_is_left_to_comfyui(module, changes):
    assert module.step_cache(options(**changes), X, converted=True) is None


def test_other_functions_and_two_nodes_are_left_to_comfyui(module):
    assert module.step_cache({}, X, converted=True) is None
    both, twice, foreign, renamed = (options() for _ in range(4))
    both["transformer_options"]["wrappers"] |= lazy()["transformer_options"]["wrappers"]
    twice["transformer_options"]["wrappers"]["model"]["easycache"] *= 2
    for given, other in (
        (foreign, function("easycache_forward_wrapper", "/custom_nodes/pack/nodes_easycache.py")),
        (renamed, function("another_wrapper")),
    ):
        given["transformer_options"]["wrappers"]["model"]["easycache"] = [other]
    assert all(module.step_cache(given, X, converted=True) is None for given in (both, twice, foreign, renamed))


def test_it_is_set_aside_for_a_while(module):
    given, extra = options(), {"model_options": options(), "seed": 3}
    guider = SimpleNamespace(model_options=given)
    with module.step_cache(given, X, converted=True).set_aside(guider, extra) as aside:
        for left in (guider.model_options, aside["model_options"]):
            transformer = left["transformer_options"]
            assert "easycache" not in transformer
            assert transformer["wrappers"] == {"outer": {}, "calc": {"other": [print]}, "model": {}}
        assert aside["seed"] == 3
    assert guider.model_options is given and "easycache" in given["transformer_options"]
    assert given["transformer_options"]["wrappers"]["model"]["easycache"]
