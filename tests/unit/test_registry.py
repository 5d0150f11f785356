"""What the registry reads of this pack: it is complete, and the pictures that it names are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def entry(name: str) -> str:
    return re.search(rf'^{name} = "(.*)"$', PROJECT, re.MULTILINE)[1]


def test_requirements_are_the_projects_own():
    """ComfyUI Manager installs requirements.txt; torch is the host's."""
    listed = re.search(r"^dependencies = \[(.*)\]$", PROJECT, re.MULTILINE)[1]
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert re.findall(r'"(.+?)"', listed) == requirements and not any(x.startswith("torch") for x in requirements)


def test_name_and_versions():
    assert re.fullmatch(r"[a-z][a-z0-9-]*", entry("name")) and "comfyui" not in entry("name")
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry("version"))
    oldest = re.search(r'^TESTED = "(\S+) to', (ROOT / "nodes/comfyui.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert entry("requires-comfyui") == f">={oldest}"
    assert f"## {entry('version')}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_changelog_is_dated_newest_first():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        days = re.findall(r"^### (\d{4}-\d\d-\d\d)$", version, re.MULTILINE)
        assert days and days == sorted(days, reverse=True)
        assert not re.search(r"^- ", version.partition("### ")[0], re.MULTILINE), "an entry without a date"


@pytest.mark.parametrize(("name", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_pictures(name, shape):
    """Of the shapes, and no larger than, the registry shows them."""
    repository = entry("Repository").replace("https://github.com/", "https://raw.githubusercontent.com/")
    base, _, path = entry(name).partition("/main/")
    assert base == repository
    with Image.open(ROOT / path) as picture:
        assert picture.width * shape[1] == picture.height * shape[0]
        assert name != "Icon" or picture.width <= 400


def test_what_comfy_node_validate_looks_for():
    """comfy-cli's command reads pyproject.toml, and has ruff look for exec, eval and statements on one line."""
    assert all(entry(name) for name in ("name", "version", "PublisherId", "DisplayName", "Repository"))
    assert 'license = { file = "LICENSE" }' in PROJECT and (ROOT / "LICENSE").is_file()
    rules = ["check", ".", "-q", "--isolated", "--no-cache", "--select", "S102,S307,E702"]
    found = subprocess.run([sys.executable, "-m", "ruff", *rules], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_is_left_out_exists():
    names = [x for x in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    assert names and all((ROOT / name).exists() for name in names)
    assert not {"nodes/", "fastusp_backend/", "web/", "locales/", "example_workflows/", "subgraphs/"} & set(names)
