"""The inputs of USP Optimization Settings are the options of `config.Settings`, each with a tooltip."""

from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from fastusp_backend.config import Settings

pytestmark = pytest.mark.unit

TYPES = get_type_hints(Settings)


def recorder(kind: str) -> SimpleNamespace:
    return SimpleNamespace(Input=lambda name, **given: (kind, name, given), Output=lambda **given: (kind, given))


@pytest.fixture
def node(node_module):
    """The node's module, for a ComfyUI that notes what it is given."""
    io = SimpleNamespace(
        ComfyNode=object,
        Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=lambda value: value,
        Input=object,
        Boolean=recorder("BOOLEAN"),
        Combo=recorder("COMBO"),
        Float=recorder("FLOAT"),
        Custom=recorder,
    )
    return node_module(
        "settings", comfyui={"io": io, "advanced": lambda entry: entry, "search_aliases": lambda *words: {}}
    )


def test_every_option_is_an_input_in_the_order_of_the_options(node):
    inputs = node.USPSettings.define_schema().inputs
    assert [name for _, name, _ in inputs] == list(Settings.__struct_fields__) == list(node.TOOLTIPS)
    for kind, name, given in inputs:
        assert kind == {bool: "BOOLEAN", float: "FLOAT"}.get(TYPES[name], "COMBO")
        assert given.get("options", []) == list(get_args(TYPES[name]))
        assert given["default"] == getattr(Settings(), name)
        assert given["tooltip"]


def test_numbers_have_bounds_that_the_settings_take(node):
    inputs = {name: given for kind, name, given in node.USPSettings.define_schema().inputs if kind == "FLOAT"}
    lowest, highest = ({name: given[end] for name, given in inputs.items()} for end in ("min", "max"))
    assert Settings(**lowest) and Settings(**highest) and len(inputs) == 3


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind not in (bool, float)])
def test_a_tooltip_says_what_each_value_does(node, name):
    assert all(value in node.TOOLTIPS[name] for value in get_args(TYPES[name]) if value != "exact" or name == "wire")


def test_workflows_may_lack_what_came_after_the_first_options(node):
    required = [name for _, name, given in node.USPSettings.define_schema().inputs if not given["optional"]]
    assert required == ["wire", "attention"]
    assert node.USPSettings.execute(wire="int8", attention="math") == Settings(wire="int8", attention="math")
