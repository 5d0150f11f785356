"""The nodes' texts, read from their source: the unit tests have no ComfyUI.

`python tests/unit/schemas.py > locales/en/nodeDefs.json` writes the English ones anew.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

NODES = Path(__file__).resolve().parents[2] / "nodes"


def schemas() -> dict[str, dict]:
    """The texts of each node as `locales/en/nodeDefs.json` has them, inputs in the order in which they are defined."""
    return dict(entry for file in ("loader", "sampler", "settings", "demo", "measuring") for entry in _schemas(file))


def _schemas(file: str) -> Iterator[tuple[str, dict]]:
    tree = ast.parse((NODES / f"{file}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "io.Schema(" in ast.unparse(node):
            yield _schema(tree, node)


def _schema(tree: ast.Module, node_class: ast.ClassDef) -> tuple[str, dict]:
    calls = [
        node for node in ast.walk(node_class) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    (schema,) = (_texts(call) for call in calls if call.func.attr == "Schema")
    inputs = {
        call.args[0].value: _texts(call)["tooltip"]
        for call in sorted(calls, key=lambda call: call.lineno)
        if call.func.attr == "Input" and isinstance(call.args[0], ast.Constant)
    }
    for node in tree.body:  # settings: the inputs are the options of `config.Settings`
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOOLTIPS":
            inputs = ast.literal_eval(node.value)
    outputs = [_texts(call) for call in calls if call.func.attr == "Output"]
    return schema["node_id"], {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": {name: {"name": name, "tooltip": tooltip} for name, tooltip in inputs.items()},
        "outputs": {str(i): {"name": o["display_name"], "tooltip": o["tooltip"]} for i, o in enumerate(outputs)},
    }


def _texts(call: ast.Call) -> dict[str, str]:
    """The keyword arguments that are texts."""
    return {
        word.arg: word.value.value
        for word in call.keywords
        if isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
    }


if __name__ == "__main__":
    print(json.dumps(schemas(), ensure_ascii=False, indent=2))
