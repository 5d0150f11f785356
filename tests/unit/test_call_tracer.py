"""The tracer sees foreign functions before they run, whoever swallows what it raises."""

import gc

import pytest
from small_library import FOLDER, load

pytestmark = pytest.mark.unit

RUNS = """
class Model:
    def apply(self, x):
        return step(x)

def step(x):
    return x + 1

def careless(x):
    try:
        step(x)
    except:
        pass
    return x

def collecting(x):
    import gc
    gc.collect()
    return step(x)
"""


@pytest.fixture
def traced(world, tmp_path):
    """(a module of the library, the pack, run(function, *args) -> what was found)."""
    _, _, pack = world
    (tmp_path / "comfy/runs.py").write_text(RUNS)
    runs = load("comfy.ldm.library", tmp_path / "comfy/runs.py")
    tracing = load("nodes_test.call_tracer", FOLDER / "call_tracer.py", __package__="nodes_test")

    def run(function, *args):
        seen = tracing.CallTracer(run.__code__)
        try:
            with seen:
                function(*args)
            seen.check_names()
        except tracing.Obstacle:
            pass
        return seen.found

    return runs, pack, run


def test_originals_pass(traced):
    runs, _, run = traced
    assert run(runs.Model().apply, 1) is None and run(runs.careless, 1) is None


def test_a_foreign_function_does_not_run(traced):
    runs, pack, run = traced
    ran = []
    runs.step = pack.wrapped(lambda x: ran.append(x))
    assert run(runs.Model().apply, 1) == "the-pack changed ldm.library.step" and not ran
    assert run(runs.careless, 1) == "the-pack changed ldm.library.step" and not ran, "swallowed"


def test_methods_of_an_instance_and_what_is_no_function(traced):
    runs, pack, run = traced
    model = runs.Model()
    model.apply = pack.wrapped(model.apply)
    assert run(runs.Model.apply, model, 1) is None, "nobody asked the instance"
    runs.step = abs
    assert run(runs.Model().apply, 1) == "builtins changed ldm.library.step"


def test_finalisers_are_nobodys_business(traced):
    runs, pack, run = traced
    gc.collect()
    pack.Finalised()
    assert run(runs.collecting, 1) is None and pack.done == [1]
    pack.Finalised()
    runs.step = pack.wrapped(runs.step)
    assert run(runs.collecting, 1) == "the-pack changed ldm.library.step" and pack.done == [1, 1]
