"""What README and the page of compatibility name exists."""

import re
from pathlib import Path

import pytest

from fastusp_backend.__main__ import COMMANDS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPATIBILITY = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")


def test_the_tests_of_the_compatibility_table_exist():
    table = COMPATIBILITY.partition("## Nodes\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(test_\w+\.py)`", table))
    assert len(named) >= 8
    assert not {name for name in named if not (ROOT / "tests/host" / name).is_file()}
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert all("test_" in row.rsplit("|", 2)[1] or "the same" in row.rsplit("|", 2)[1] for row in rows)


def test_what_people_ask_first_is_answered():
    """How it looks, where it comes from, how it differs from what ComfyUI has, how it is kept new and removed."""
    head, install = README.split("## Speed")[0], README.partition("## Install\n")[2].partition("\n## ")[0]
    assert "](docs/images/workflow.webp)" in head and "git clone https://github.com/" in install
    assert all(text in README for text in ("## Beside ComfyUI's MultiGPU CFG Split", "**Update**", "**Removal**"))


def test_the_commands_that_it_names_exist():
    named = set(re.findall(r"python -m fastusp_backend (\w+)", README))
    assert named == set(COMMANDS) - {"demo"}  # `make demo`
