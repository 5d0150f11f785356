"""What proves that a function is still its file's own, without a ComfyUI: a small library and a pack in files."""

import functools
import sys
import types
from pathlib import Path

import pytest
from small_library import FOLDER, LIBRARY, load

pytestmark = pytest.mark.unit

EVERYTHING = ["helper", "sample", "remembered", "either", "Guider.predict", "Guider.twice", "Guider.still"]


@pytest.mark.parametrize("name", EVERYTHING)
def test_originals(world, name):
    provenance, library, _ = world
    assert provenance.is_original(library, name)
    assert not provenance.is_original(library, f"{name}_not_there")


@pytest.fixture
def reachable(world):
    return load("nodes_test.reachable", FOLDER / "reachable.py", __package__="nodes_test")


def changes(reachable, library) -> list[str]:
    return [name for _, name, _ in reachable.Unchanged(library.Guider).changes()]


@pytest.mark.parametrize("name", ["helper", "Guider.predict"])
def test_what_hides_behind_the_originals_name(world, reachable, name):
    provenance, library, pack = world
    *owner, last = name.split(".")
    place = getattr(library, owner[0]) if owner else library
    original = getattr(place, last)
    for changed in (pack.wrapped(original), functools.partial(original), library.Guider.still, original.__class__):
        setattr(place, last, changed)
        assert not provenance.is_original(library, name), changed
    setattr(place, last, pack.wrapped(original))
    assert getattr(place, last).__module__ == library.__name__  # it says so
    assert provenance.owner(getattr(place, last)) == "the-pack"
    assert provenance.change_of(library, name, getattr(place, last)) == f"the-pack changed ldm.library.{name}"
    assert changes(reachable, library) == [name]
    setattr(place, last, original)
    assert provenance.is_original(library, name) and not changes(reachable, library)


def test_a_function_of_the_same_file_under_another_name(world):
    provenance, library, _ = world
    library.helper = library.either
    assert not provenance.is_original(library, "helper")


def test_code_or_globals_that_were_exchanged(world):
    provenance, library, _ = world
    library.helper = types.FunctionType(library.helper.__code__, {"KEY": 3}, "helper")
    assert not provenance.is_original(library, "helper")
    library.either.__code__ = (lambda x: x).__code__
    assert not provenance.is_original(library, "either")


def test_a_file_that_changed_while_it_was_loaded(world):
    provenance, library, _ = world
    path = Path(library.__file__)
    path.write_text(LIBRARY.replace("return inner(x)", "return inner(x) + 1"))
    assert not provenance.is_original(library, "helper")
    assert "restart ComfyUI" in provenance.change_of(library, "helper", library.helper)
    for gone in ("this is no Python (", None):
        provenance.codes.cache_clear()
        path.write_text(gone) if gone else path.unlink()
        assert provenance.codes(library) == {}


def test_a_replaced_class(world, reachable):
    _, library, pack = world
    unchanged = reachable.Unchanged(library.Guider)
    assert not [*unchanged.changes()]
    kind, library.Guider = library.Guider, pack.Other
    assert [name for _, name, _ in unchanged.changes()] == ["Guider"]
    library.Guider = kind
    assert not [*unchanged.changes()]


def test_what_a_class_inherits_is_looked_at_too(world, reachable):
    _, library, pack = world
    unchanged = reachable.Unchanged(library.Derived)
    assert not [*unchanged.changes()] and unchanged.reader("read_by_sample") is None
    library.Guider.predict = pack.wrapped(library.Guider.predict)
    assert [name for _, name, _ in unchanged.changes()] == ["Guider.predict"]
    assert unchanged.reader("read_further") == "ldm.helpers.further"


def test_what_is_no_function_is_a_change_too(world, reachable):
    """At names that a module defines, and at those that it imports."""
    _, library, pack = world
    library.near = sys.modules["comfy.ldm.helpers"].near
    unchanged = reachable.Unchanged(library.Guider)
    assert not [*unchanged.changes()]
    for name in ("near", "helper"):
        original = getattr(library, name)
        for other in (pack.Callable(), functools.partial(original)):
            setattr(library, name, other)
            assert [whole for _, whole, _ in unchanged.changes()] == [name]
        setattr(library, name, original)
    assert not [*unchanged.changes()]


def test_a_change_after_the_first_look_is_seen(world, reachable):
    _, library, pack = world
    unchanged, helpers = reachable.Unchanged(library.Guider), sys.modules["comfy.ldm.helpers"]
    assert not [*unchanged.changes()]
    for place, name in ((library.Guider, "predict"), (library, "helper"), (helpers, "further")):
        original = getattr(place, name)
        setattr(place, name, pack.wrapped(original))
        assert [whole.rpartition(".")[2] for _, whole, _ in unchanged.changes()] == [name]
        setattr(place, name, original)
    for harmless in ("unrelated", "far", "new"):  # nothing that the class reaches names them
        setattr(helpers, harmless, pack.wrapped(len))
    assert not [*unchanged.changes()]


def test_what_decorators_write_is_no_change(world, reachable):
    _, library, _ = world
    assert "__init__" in vars(library.Sizes)
    assert reachable.changed(reachable.Place(library, "Sizes")) is None


def test_what_is_reached(world, reachable):
    _, library, _ = world
    named = {f"{p.module.__name__}.{p.name}" for p in reachable.reached(library, "Guider", "comfy.ldm.")}
    assert named == {
        "comfy.ldm.library.Guider",
        "comfy.ldm.library.helper",
        "comfy.ldm.helpers.near",
        "comfy.ldm.helpers.further",
    }
    assert {p.name for p in reachable.reached(library, "Guider", "comfy.ldm.library")} == {"Guider", "helper"}


def test_who_reads_and_who_left_a_key(world, reachable):
    provenance, library, _ = world
    unchanged = reachable.Unchanged(library.Guider)
    assert unchanged.reader("read_further") == "ldm.helpers.further"
    assert unchanged.reader("read_by_the_class") == "ldm.library.Guider"
    assert unchanged.reader("read_by_the_unrelated") is None and unchanged.reader("read_by_nobody") is None
    assert provenance.packs_naming("left_by_the_pack") == ["the-pack"] and provenance.packs_naming("else") == []


def test_core_nodes_are_named_shortly(world):
    provenance, library, pack = world
    path = str(Path(library.__file__).parents[2] / "comfy_extras/nodes_more.py")
    function = types.FunctionType(pack.wrapped.__code__.replace(co_filename=path), {})
    assert provenance.owner(function) == "comfy_extras.nodes_more"
