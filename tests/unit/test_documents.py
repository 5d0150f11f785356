"""The help pages name every option, with its values and its default."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fastusp_backend.config import BatchParallel, Settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TYPES = get_type_hints(Settings)
DEFAULTS = Settings()


def section(file: str, start: str, end: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    return text[text.index(start) :].partition(end)[0]


def rows(text: str) -> dict[str, str]:
    """Of a section's first list, whose items are "- `name`: meaning": name -> meaning."""
    items = re.search(r"(?:^- .*\n?)+", text, re.MULTILINE)[0]
    return dict(re.findall(r"^- `([\w-]+)`: (.*)$", items, re.MULTILINE))


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def values(name: str) -> list[str]:
    return ["on", "off"] if TYPES[name] is bool else list(get_args(TYPES[name]))


PAGE = rows(section("web/docs/FastUSPSettings.md", "## Inputs", "\n### "))


def test_all_options_are_on_the_page():
    assert list(PAGE) == list(Settings.__struct_fields__)


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_the_page_tells_values_and_default_of(name):
    meaning, default = PAGE[name], getattr(DEFAULTS, name)
    if TYPES[name] is bool:
        assert f"Default: {'on' if default else 'off'}." in meaning
        return
    assert f"Default: `{default}`." in meaning
    if TYPES[name] is float:
        return
    if "See below." in meaning:
        assert list(rows(section("web/docs/FastUSPSettings.md", f"### {name}\n", "\n#"))) == values(name)
    else:
        assert set(quoted(meaning)) == set(values(name))


def test_batch_parallel():
    page = rows(section("web/docs/FastUSPLoader.md", "### batch_parallel\n", "\n#"))
    assert list(page) == list(get_args(BatchParallel))
