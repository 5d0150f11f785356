"""Who may import whom: the backend knows nothing of ComfyUI, rooms import downwards only, nothing unpickles."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "fastusp_backend"
NODES = ROOT / "nodes"
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}

# A room's allowed imports within fastusp_backend; what is named with a dot is allowed alone.
BASE = {"config", "errors"}
ROOMS = {
    "": set(),
    "config": {"errors"},
    "errors": set(),
    "device_sets": set(),
    "devices": {"device_sets", "visible", "nvml", "once", "errors"},
    "nvml": {"command", "errors"},
    "visible": {"command", "once", "errors"},
    "once": {"errors"},
    "command": {"environment"},
    "environment": set(),
    "pinning": set(),
    "pulse": set(),
    "ports": set(),
    "host_memory": set(),
    "read_ahead": {"host_memory"},
    "choices": {"user_folders"},
    "user_folders": set(),
    "prompt": {"errors"},
    "planner": BASE,
    "library": BASE,
    "servers": {"keyfile", "errors"},
    "keyfile": {"command", "user_folders", "errors"},
    "door": {"protocol", "keyfile", "errors"},
    "side_door": {"protocol", "errors"},
    "meeting": {"protocol", "door", "errors"},
    "protocol": BASE | {"pinning"},
    "comm": {"config", "kernels", "pinning", "ports", "pulse"},
    "kernels": set(),
    "attention": {"config", "comm", "kernels", "pulse"},
    "weights": BASE | {"kernels", "comm"},
    "models": BASE | {"prompt", "weights", "kernels", "attention", "choices"},
    "engine": BASE
    | {"prompt", "models", "weights", "attention", "comm", "kernels.fp8_product", "kernels.tokens"}
    | {"library", "host_memory", "pinning", "pulse"},
    "sampling": {"prompt", "config"},
    "shapes": BASE | {"prompt"},
    "worker": BASE
    | {"prompt", "sampling", "engine", "models", "protocol"}
    | {"comm.groups", "meeting", "ports", "pulse"},
    "worker.process": {"pulse"},
    "pool": BASE
    | {"prompt", "protocol", "devices", "environment", "library", "door", "side_door"}
    | {"worker.process", "ports", "pulse", "read_ahead"},
    "server": BASE | {"prompt", "pool", "protocol", "devices", "keyfile", "door", "side_door", "meeting", "pulse"},
}
ABOVE_ALL = {"cli", "__main__"}
FOR_NODES = (
    BASE
    | {"prompt", "pool", "planner", "devices", "servers", "sampling", "shapes"}
    | {"cli.bench", "cli.file", "cli.inputs", "cli.verify"}
    | {"models.detection", "models.files", "models.placement", "models.prediction"}
    | {"weights.tensor_info", "weights.dtypes", "weights.adapters"}
)


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file, also those inside functions; from a import b gives a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names]
    return found


def backend_module(path: Path) -> str:
    return ".".join(path.relative_to(BACKEND).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def resolve(package: list[str], level: int, name: str) -> str | None:
    """The dotted name within fastusp_backend that a relative import means; None where it leaves the package."""
    if level - 1 > len(package):
        return None
    return ".".join([*package[: len(package) - (level - 1)], *filter(None, name.split("."))])


def allows(allowed: set[str], target: str) -> bool:
    return any(target == name or target.startswith(name + ".") for name in allowed)


def exists(target: str) -> bool:
    """Whether a dotted name is a module (else its last part is a name inside one)."""
    path = BACKEND.joinpath(*target.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


BACKEND_FILES = sorted(BACKEND.rglob("*.py"))
NODE_FILES = sorted(NODES.rglob("*.py"))


def test_there_is_something_to_check():
    assert len(BACKEND_FILES) > 30
    assert {backend_module(path).split(".")[0] for path in BACKEND_FILES} <= {*ROOMS, *ABOVE_ALL}


@pytest.mark.parametrize("path", BACKEND_FILES, ids=backend_module)
def test_backend_imports(path):
    module = backend_module(path)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    room = module if module in ROOMS else module.split(".")[0]
    for level, name in imports(path):
        if level == 0:
            top = name.split(".")[0]
            assert top not in COMFYUI, f"{module} imports {name}"
            assert top != "fastusp_backend", f"{module} imports {name} absolutely"
            continue
        target = resolve(package, level, name)
        assert target is not None, f"{module} imports {'.' * level}{name}, beyond the backend"
        if room in ABOVE_ALL or target.split(".")[0] == module.split(".")[0] and module not in ROOMS:
            continue
        if path.name == "__init__.py" and target.startswith(f"{module}."):
            continue
        package_facts = not exists(target) and "." not in target  # such as __version__
        assert package_facts or allows(ROOMS[room], target), f"{module} imports {target}"


@pytest.mark.parametrize("path", NODE_FILES, ids=lambda path: path.stem)
def test_node_imports(path):
    for level, name in imports(path):
        if level == 0:
            top = name.split(".")[0]
            assert top != "fastusp_backend", f"{path.name} imports {name} absolutely"
            assert top not in COMFYUI or path.stem == "comfyui", f"{path.name} imports {name}, not from comfyui.py"
        elif level == 2:
            assert name.startswith("fastusp_backend."), f"{path.name} imports ..{name}"
            target = name.removeprefix("fastusp_backend.")
            package_facts = not exists(target) and "." not in target  # such as __version__
            assert package_facts or allows(FOR_NODES, target), f"{path.name} imports {name}"
        else:
            assert level == 1, f"{path.name} imports {name}"


def test_the_documents_table_of_rooms_is_this_one():
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("| room |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    drawn = {room.strip("`/").replace("/", "."): set(may.split(", ")) - {"nothing"} for room, _, may in rows}
    assert drawn.pop("cli") == {"everything but nodes"}
    assert drawn == {room: allowed for room, allowed in ROOMS.items() if room} | {"nodes": FOR_NODES}


@pytest.mark.parametrize("folder", ["fastusp_backend", "nodes", "web", "tests", "benchmarks"])
def test_no_file_is_long(folder):
    """What grows beyond this has two subjects."""
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".js")]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert files and not {name: lines for name, lines in lengths.items() if lines > 300}


FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"send_object_list", "recv_object_list", "broadcast_object_list", "all_gather_object"}
SOCKETS = {"_socket"}


@pytest.mark.parametrize("path", [*BACKEND_FILES, *NODE_FILES], ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nothing_is_pickled(path):
    for _, name in imports(path):
        assert not FORBIDDEN_MODULES & set(name.split(".")), name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        call = ast.unparse(node.func)
        owner = node.func.value.attr if isinstance(node.func.value, ast.Attribute) else call.split(".")[0]
        assert call not in ("torch.load", "torch.save", "np.load", "numpy.load"), call
        if node.func.attr == "recv":
            assert owner in SOCKETS, f"{path.name}: {call} (Connection.recv unpickles)"
        elif node.func.attr == "send":
            assert "connection" not in owner, f"{path.name}: {call} (Connection.send pickles)"
        else:
            assert node.func.attr not in FORBIDDEN_CALLS, f"{path.name}: {call}"


def test_the_backend_brings_nothing_of_comfyui():
    program = (
        "import sys\n"
        "import fastusp_backend.worker.runner, fastusp_backend.worker.control, fastusp_backend.pool\n"
        "import fastusp_backend.planner, fastusp_backend.devices\n"
        f"print(sorted({COMFYUI!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"
