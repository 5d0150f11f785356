"""A small library under ComfyUI's name, and a pack, in files, to try nodes/provenance.py and its neighbours on."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "nodes"
LIBRARY = """
import contextlib
import dataclasses
import functools
import sys
import torch

helpers = sys.modules["comfy.ldm.helpers"]
far = helpers.far

KEY = "read_by_the_module"

@dataclasses.dataclass
class Sizes:
    width: int = 3

class Guider:
    label = "read_by_the_class"

    def predict(self, x):
        return x + helper(x) + helpers.near(x)

    @property
    def twice(self):
        return 2

    @staticmethod
    def still(x):
        return x

class Derived(Guider):
    def own(self):
        return 1

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
HELPERS = """
def near(x):
    return further(x)

def further(x):
    return x.get("read_further", 0)

def far(x):
    return x

def unrelated(x):
    return "read_by_the_unrelated"
"""
PACK = """
import functools

KEYS = ("left_by_the_pack",)

def wrapped(original):
    @functools.wraps(original)
    def function(*args, **kwargs):
        return original(*args, **kwargs)
    return function

done = []

def note():
    done.append(1)

class Finalised:
    def __init__(self):
        self.self = self

    def __del__(self):
        note()

class Other:
    pass

class Callable:
    def __call__(self, *args):
        return 0
"""


def load(name: str, file: Path, **attributes) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    vars(module).update(attributes)
    spec.loader.exec_module(module)
    return module


class _Executor:
    """Stands for ComfyUI's of wrappers; none is used here."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(nodes/provenance.py, the library's module, the pack's)."""
    names = ["comfy.ldm.library", "comfy.ldm.helpers", "the_pack", "nodes_test"]
    names += [f"nodes_test.{name}" for name in ("comfyui", "provenance", "reachable", "call_tracer")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    library, pack = tmp_path / "comfy/ldm/library.py", tmp_path / "custom_nodes/the-pack/__init__.py"
    helpers = library.with_name("helpers.py")
    for path, text in ((library, LIBRARY), (helpers, HELPERS), (pack, PACK)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = types.SimpleNamespace(get_folder_paths=lambda _kind: [str(tmp_path / "custom_nodes")])
    samplers = types.SimpleNamespace(__file__=str(tmp_path / "comfy/samplers.py"))
    package = types.ModuleType("nodes_test")
    package.__path__ = []
    sys.modules["nodes_test"] = package
    comfyui = sys.modules["nodes_test.comfyui"] = types.ModuleType("nodes_test.comfyui")
    comfyui.folder_paths, comfyui.samplers, comfyui.WrapperExecutor = paths, samplers, _Executor
    load("comfy.ldm.helpers", helpers)
    yield (
        load("nodes_test.provenance", FOLDER / "provenance.py", __package__="nodes_test"),
        load("comfy.ldm.library", library),
        load("the_pack", pack),
    )
    for name in names:
        sys.modules.pop(name, None)
