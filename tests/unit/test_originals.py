"""What proves that a function is still its file's own, without a ComfyUI: a small library and a pack in files."""

import functools
import importlib.util
import sys
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

FILE = Path(__file__).resolve().parents[2] / "nodes/originals.py"
LIBRARY = """
import contextlib
import dataclasses
import functools
import torch

KEY = "read_by_the_module"

@dataclasses.dataclass
class Sizes:
    width: int = 3

class Guider:
    label = "read_by_the_class"

    def predict(self, x):
        return x + helper(x)

    @property
    def twice(self):
        return 2

    @staticmethod
    def still(x):
        return x

def helper(x):
    inner = lambda y: y * 2
    return inner(x)

@torch.no_grad()
def sample(x, options={}):
    return helper(x) + options.get("read_by_sample", 0)

@functools.lru_cache
def remembered(x):
    return x

if KEY:
    def either(x):
        return 1
else:
    def either(x):
        return 2
"""
PACK = """
import functools

KEYS = ("left_by_the_pack",)

def wrapped(original):
    @functools.wraps(original)
    def function(*args, **kwargs):
        return original(*args, **kwargs)
    return function

class Other:
    pass
"""


def load(name: str, file: Path, **attributes) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    vars(module).update(attributes)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(tmp_path, monkeypatch):
    """originals, the library's module and the pack's."""
    names = "originals_test", "originals_test.comfyui", "originals_test.originals", "comfy.ldm.library", "the_pack"
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    library, pack = tmp_path / "comfy/library.py", tmp_path / "custom_nodes/the-pack/__init__.py"
    for path, text in ((library, LIBRARY), (pack, PACK)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    paths = types.SimpleNamespace(get_folder_paths=lambda _kind: [str(tmp_path / "custom_nodes")])
    samplers = types.SimpleNamespace(__file__=str(tmp_path / "comfy/samplers.py"))
    package = types.ModuleType("originals_test")
    package.__path__ = []
    sys.modules["originals_test"] = package
    comfyui = sys.modules["originals_test.comfyui"] = types.ModuleType("originals_test.comfyui")
    comfyui.folder_paths, comfyui.samplers = paths, samplers
    yield (
        load("originals_test.originals", FILE, __package__="originals_test"),
        load("comfy.ldm.library", library),
        load("the_pack", pack),
    )
    for name in names:
        sys.modules.pop(name, None)


EVERYTHING = ["helper", "sample", "remembered", "either", "Guider.predict", "Guider.twice", "Guider.still"]


@pytest.mark.parametrize("name", EVERYTHING)
def test_originals(world, name):
    originals, library, _ = world
    assert originals.is_original(library, name)
    assert not originals.is_original(library, f"{name}_not_there")


@pytest.mark.parametrize("name", ["helper", "sample", "Guider.predict"])
def test_what_hides_behind_the_originals_name(world, name):
    originals, library, pack = world
    *owner, last = name.split(".")
    place = getattr(library, owner[0]) if owner else library
    original = getattr(place, last)
    for changed in (pack.wrapped(original), functools.partial(original), library.Guider.still, original.__class__):
        setattr(place, last, changed)
        assert not originals.is_original(library, name), changed
    setattr(place, last, pack.wrapped(original))
    assert getattr(place, last).__module__ == library.__name__  # it says so
    assert originals.owner(getattr(place, last)) == "the-pack"
    assert [name for name, _ in originals.replaced_in(library)] == [f"comfy.ldm.library.{name}"]
    setattr(place, last, original)
    assert originals.is_original(library, name) and not [*originals.replaced_in(library)]


def test_a_function_of_the_same_file_under_another_name(world):
    originals, library, _ = world
    library.helper = library.either
    assert not originals.is_original(library, "helper")


def test_code_that_was_exchanged(world):
    originals, library, _ = world
    library.helper.__code__ = (lambda x: x).__code__
    assert not originals.is_original(library, "helper")


def test_a_replaced_class(world):
    originals, library, pack = world
    library.Guider = pack.Other
    assert [name for name, _ in originals.replaced_in(library)] == ["comfy.ldm.library.Guider"]


def test_what_decorators_write_is_no_replacement(world):
    originals, library, _ = world
    assert "__init__" in vars(library.Sizes) and not [*originals.replaced_in(library)]


def test_names_that_are_used(world):
    originals, library, _ = world
    assert originals.used_functions(library, "sample") == {"sample", "helper"}


def test_who_reads_and_who_left_a_key(world):
    originals, library, _ = world
    modules = frozenset([library])
    assert originals.reader("read_by_sample", modules) == "comfy.ldm.library.sample"
    assert originals.reader("read_by_the_module", modules) == "comfy.ldm.library.<module>"
    assert originals.reader("read_by_the_class", modules) == "comfy.ldm.library.Guider.<class>"
    assert originals.reader("read_by_nobody", modules) is None
    assert originals.packs_naming("left_by_the_pack") == ["the-pack"] and originals.packs_naming("else") == []


def test_modules_of_a_family(world):
    originals, library, _ = world
    assert originals.family_modules(library.Guider) == [library]
