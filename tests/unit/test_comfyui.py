"""What the nodes need of ComfyUI is checked when they are loaded, and what is missing is named."""

import ast
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

FILE = Path(__file__).resolve().parents[2] / "nodes/comfyui.py"


def load(name: str = "fastusp_test_comfyui") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def used() -> dict[str, list[str]]:
    """The table, read without running its file."""
    source = FILE.read_text()
    start = source.index("USED = ")
    return ast.literal_eval(source[start + len("USED = ") : source.index("}\n", start) + 1])


def thing(parameters: str):
    """A callable of these parameters that can have attributes."""

    class Thing:
        pass

    names = [name for name in parameters.rstrip(")").split(", ") if name]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    Thing.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return Thing


@pytest.fixture
def comfyui(monkeypatch):
    """A ComfyUI of exactly what is used, as modules by name."""
    modules = {}
    for name, uses in used().items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        for use in uses:
            path, _, parameters = use.partition("(")
            *owners, leaf = path.split(".")
            place = modules[name]
            for owner in owners:
                if not hasattr(place, owner):
                    setattr(place, owner, thing(""))
                place = getattr(place, owner)
            if not hasattr(place, leaf):
                setattr(place, leaf, thing(parameters))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        owner, _, leaf = name.rpartition(".")
        if owner:
            module.__package__ = owner
            setattr(modules[owner], leaf, module)
    version = ModuleType("comfyui_version")
    version.__version__ = "0.99.1"
    monkeypatch.setitem(sys.modules, "comfyui_version", version)
    return modules


def test_a_comfyui_that_has_it_all(comfyui):
    assert load().ModelPatcher is comfyui["comfy.model_patcher"].ModelPatcher


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("comfy.model_patcher", "ModelPatcher", "partially_unload"),
        ("comfy.patcher_extension", "WrappersMP", "SAMPLER_SAMPLE"),
        ("folder_paths", "", "get_full_path"),
    ],
)
def test_what_is_missing_is_named(comfyui, module, owner, name):
    delattr(getattr(comfyui[module], owner) if owner else comfyui[module], name)
    path = ".".join(filter(None, (module, owner, name)))
    with pytest.raises(
        ImportError, match=rf"^Update ComfyUI.* 0.3.64 to 0.33.0, .*\(version 0.99.1\): {path} does not exist"
    ) as error:
        load()
    assert traceback.format_exception_only(error.value)[0].startswith("FastUSP.UnsupportedComfyUI: ")


def test_a_changed_signature_is_named(comfyui):
    comfyui["comfy.model_patcher"].ModelPatcher.detach = lambda self, everything: None
    with pytest.raises(ImportError, match="comfy.model_patcher.ModelPatcher.detach takes no unpatch_all"):
        load()


def test_a_module_that_went_is_named(comfyui, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_execution.utils", None)
    with pytest.raises(ImportError, match="no module comfy_execution.utils"):
        load()


def test_a_module_that_cannot_be_imported_is_named(comfyui, monkeypatch, tmp_path):
    (tmp_path / "folder_paths.py").write_text("from json import no_such_name")
    monkeypatch.delitem(sys.modules, "folder_paths")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="its module folder_paths cannot be imported .*no_such_name"):
        load()


def test_a_torch_that_is_too_old_is_named(comfyui, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.6.0+cu124")
    with pytest.raises(ImportError, match=r"Update ComfyUI's torch: .* 2.7 or newer, and this is 2.6.0\+cu124"):
        load()
    monkeypatch.setattr("torch.__version__", "2.10.0a0+git123")
    load()


def test_a_schema_is_looked_at_once(comfyui, monkeypatch):
    """ComfyUI asks for each node's anew, several times a prompt, on the thread that serves everybody."""
    module, looks = load(), []
    monkeypatch.setattr(module.io, "Schema", thing("node_id, search_aliases)"))
    look = inspect.signature
    monkeypatch.setattr(module.inspect, "signature", lambda of: looks.append(of) or look(of))
    for _ in range(3):
        assert module.search_aliases("one", "two") == {"search_aliases": ["one", "two"]} and module.dev_only() == {}
    assert looks == [module.io.Schema]
