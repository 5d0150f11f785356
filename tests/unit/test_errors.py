"""What ComfyUI's page puts before an error's message: its module and its name."""

import traceback

import pytest

from fastusp_backend import errors

pytestmark = pytest.mark.unit


def everything_below(kind: type) -> set[type]:
    return {kind}.union(*map(everything_below, kind.__subclasses__()))


def test_the_module_of_every_error_is_the_packs_name():
    known = everything_below(errors.FastUSPError)
    assert {errors.RequestError, errors.PatchesLost, errors.PoolError} < known
    assert {kind.__module__ for kind in known} == {"FastUSP"}


def test_also_of_one_that_is_defined_elsewhere():
    class Elsewhere(errors.LayoutError):
        pass

    assert Elsewhere.__module__ == "FastUSP"


def test_tracebacks_are_whole():
    try:
        raise errors.RequestError("no")
    except errors.RequestError as error:
        lines = traceback.format_exception(error)
    assert __file__ in lines[1] and lines[-1] == "FastUSP.RequestError: no\n"
