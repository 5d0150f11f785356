"""The pack as ComfyUI Manager installs it: the registry's archive or a clone of the repository in custom_nodes, and its
requirements with pip."""

import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from comfy import REPOSITORY

pytestmark = [pytest.mark.host, pytest.mark.any_host]

PACK = "ComfyUI-FastUSP"


def nothing_is_missing(python: str, pack: Path) -> None:
    """pip finds all that the pack requires."""
    wanted = [python, "-m", "pip", "install", "--dry-run", "--no-index", "-r", pack / "requirements.txt"]
    answer = subprocess.run(wanted, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "Would install" not in answer.stdout, answer.stderr


def test_an_installed_copy(second_host):
    pack = second_host.base / "custom_nodes" / PACK
    assert not pack.is_symlink() and not (pack / "tests").exists()
    nothing_is_missing(second_host.python, pack)
    assert "IMPORT FAILED" not in second_host.log_text()
    for node in ("FastUSPLoader", "FastUSPSampler", "FastUSPSettings"):
        assert second_host.get(f"/object_info/{node}")[node]["python_module"] == f"custom_nodes.{PACK}"


@pytest.fixture
def clone(tmp_path):
    """By the repository's address."""
    if not (REPOSITORY / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git repository")
    pack = tmp_path / "custom_nodes" / PACK
    subprocess.run(["git", "clone", "-q", "--depth", "1", REPOSITORY.as_uri(), pack], check=True, timeout=60)
    return pack


def test_a_clone(host, clone):
    """Manager would also run an install.py: there is none."""
    assert not (clone / "install.py").exists()
    nothing_is_missing(host.python, clone)


@pytest.mark.thorough
def test_a_host_with_a_clone(host, clone, tmp_path):
    """As one with the archive, which another test starts."""
    command = [host.python, "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", tmp_path]
    command += ["--disable-api-nodes", "--database-url", f"sqlite:///{tmp_path}/comfyui.db"]
    answer = subprocess.run(command, cwd=host.path, capture_output=True, text=True, timeout=120)
    told = answer.stdout + answer.stderr
    assert answer.returncode == 0 and f"custom_nodes/{PACK}" in told and "IMPORT FAILED" not in told, told


def test_its_templates_and_files_for_the_page(second_host):
    examples = REPOSITORY / "example_workflows"
    titles = sorted(path.stem for path in examples.glob("*.json"))
    assert sorted(second_host.get("/workflow_templates")[PACK]) == titles
    served = {f"api/workflow_templates/{PACK}/{title}.{end}": examples for title in titles for end in ("json", "jpg")}
    served |= {f"extensions/{PACK}/{path.name}": path.parent for path in (REPOSITORY / "web").glob("*.js")}
    for address, folder in served.items():
        url = f"http://127.0.0.1:{second_host.port}/{urllib.parse.quote(address)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read() == (folder / address.rpartition("/")[2]).read_bytes()
