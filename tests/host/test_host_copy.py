"""The pack as the registry gives it, installed as ComfyUI Manager does: copied, and its requirements with pip."""

import subprocess
import urllib.parse
import urllib.request

import pytest
from comfy import REPOSITORY

pytestmark = [pytest.mark.host, pytest.mark.any_host]

PACK = "ComfyUI-FastUSP"


def test_an_installed_copy(second_host):
    pack = second_host.base / "custom_nodes" / PACK
    assert not pack.is_symlink() and not (pack / "tests").exists()
    wanted = [second_host.python, "-m", "pip", "install", "--dry-run", "--no-index", "-r", pack / "requirements.txt"]
    answer = subprocess.run(wanted, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "Would install" not in answer.stdout, answer.stderr
    assert "IMPORT FAILED" not in second_host.log_text()
    for node in ("FastUSPLoader", "FastUSPSampler", "FastUSPSettings"):
        assert second_host.get(f"/object_info/{node}")[node]["python_module"] == f"custom_nodes.{PACK}"


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
