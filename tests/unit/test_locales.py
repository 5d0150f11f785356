"""What the page shows in other languages says what the nodes and the English pages say: nothing is missing, or left
over from an earlier day."""

import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from schemas import schemas

from fastusp_backend.config import Settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
LOCALES = sorted(folder.name for folder in (ROOT / "locales").iterdir())
TRANSLATED = [language for language in LOCALES if language != "en"]
NODES = sorted(schemas())
SCRIPTS = sorted((ROOT / "web").glob("*.js"))
CHINESE_OR_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
OPTIONS = get_type_hints(Settings)
QUOTED = re.compile(r"`([^`]+)`")


def locale(language: str, file: str) -> dict:
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


def leaves(tree, path: tuple = ()) -> dict[tuple, str]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {end: text for key, branch in tree.items() for end, text in leaves(branch, (*path, key)).items()}


def test_the_english_texts_are_the_nodes_own():
    assert LOCALES == ["en", "ja", "zh"]
    assert locale("en", "nodeDefs") == schemas(), "python tests/unit/schemas.py > locales/en/nodeDefs.json"


@pytest.mark.parametrize("file", ["commands", "main", "nodeDefs"])
@pytest.mark.parametrize("language", TRANSLATED)
def test_the_same_texts_in(language, file):
    texts, english = leaves(locale(language, file)), leaves(locale("en", file))
    assert texts.keys() == english.keys() and all(texts.values())
    assert not [path for path, text in texts.items() if re.search(r"[@{}|]", text)], "the page reads these as its own"
    prose = [path for path, text in english.items() if " " in text and path[0] != "nodeCategories"]
    assert not [path for path in prose if not CHINESE_OR_JAPANESE.search(texts[path])]


def test_the_page_finds_what_its_menus_say():
    """It looks for an entry under its English words, as a path that a dot, quote or bracket would break."""
    menus = [locale("en", "main")[menu] for menu in ("menuLabels", "contextMenu")]
    assert all(key == text and not re.search(r"""[.'"\[\]]""", key) for menu in menus for key, text in menu.items())
    assert list(menus[0]) == [command["label"] for command in locale("en", "commands").values()]
    of_nodes = re.findall(r"\.\.\.entry\(\w+, node, (.*)\),", (ROOT / "web/commands.js").read_text(encoding="utf-8"))
    assert set(menus[1]) == {text for entry in of_nodes for text in re.findall(r'"([^"]+)"', entry)}


def said_by_the_page() -> list[str]:
    """What the scripts say, and mark to be said."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    calls = rf"\b(?:say|word)\(\s*({quoted}(?:\s*\+\s*{quoted})*)"
    found = [call for script in SCRIPTS for call in re.findall(calls, script.read_text(encoding="utf-8"))]
    return ["".join(map(json.loads, re.findall(quoted, call))) for call in found]


@pytest.mark.parametrize("language", TRANSLATED)
def test_the_pages_own_words_in(language):
    table = json.loads((ROOT / f"web/words/{language}.json").read_text(encoding="utf-8"))
    assert table.keys() == {*said_by_the_page()}
    for english, text in table.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", english)), english
        assert CHINESE_OR_JAPANESE.search(text) or not re.search(r"[a-z]{3}", re.sub(r"{\w+}", "", english)), english


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_page_shows_no_word_that_is_not_looked_up(script):
    shown = r"""(?:element\("\w+", |textContent = |title = |aria-label", |summary: |detail: |toast\("\w+", )["`]"""
    found = re.findall(shown + r"(?!FastUSP: \$)[^\n]*[A-Za-z ]{4}[^\n]*", script.read_text(encoding="utf-8"))
    assert not [line for line in found if "say(" not in line]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_tooltips_name_every_value_in(language, node):
    """Numbers, folders and names of inputs are the same in each language, too. The loader's tooltips introduce values
    with a colon."""
    for name, entry in schemas()[node]["inputs"].items():
        said = locale(language, "nodeDefs")[node]["inputs"][name]["tooltip"]
        values = re.findall(r"([\w:,]+): ", entry["tooltip"]) if node == "FastUSPLoader" else []
        values += [x for x in get_args(OPTIONS.get(name)) if x in entry["tooltip"]] if node == "FastUSPSettings" else []
        others = re.findall(r"\b(?:models/\w+|--[\w-]+|\d+(?:\.\d+)?|[A-Z]+\d+|\w+_\w+)", entry["tooltip"])
        assert not [word for word in {*values, *others} if word not in said], name


def shape(page: str) -> list[tuple]:
    """Of each section: its heading's level, what its items begin with, and what is in backticks."""
    sections = re.split(r"^(?=#+ )", page, flags=re.MULTILINE)[1:]
    return [
        (
            re.match("#+", section)[0],
            re.findall(r"^- (`[^`]+`|(?=.))", section, re.MULTILINE),
            len(section.split("\n\n")),
            sorted(set(QUOTED.findall(section))),
        )
        for section in sections
    ]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_help_has_the_same_sections_and_inputs_in(language, node):
    """The page looks for `docs/<node>/<language>.md`, then for `docs/<node>.md`."""
    english = (ROOT / f"web/docs/{node}.md").read_text(encoding="utf-8")
    page = (ROOT / f"web/docs/{node}/{language}.md").read_text(encoding="utf-8")
    for ours, theirs in zip(shape(english), shape(page), strict=True):
        assert theirs == ours
    assert page.startswith(f"# {locale(language, 'nodeDefs')[node]['display_name']}\n")
    assert set(schemas()[node]["inputs"]) <= set(re.findall(r"^- `(\w+)`", page, re.MULTILINE))


@pytest.mark.parametrize("page", sorted(ROOT.glob("web/docs/**/*.md")), ids=lambda page: "/".join(page.parts[-2:]))
def test_help_wraps_in_a_narrow_side_bar(page):
    """No tables and blocks of code, and no word that is wider than the side bar's default of 232 pixels."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^\||```", text, re.MULTILINE)
    assert not [word for code in QUOTED.findall(text) for word in re.split(r"[\s-]", code) if len(word) > 22]
    assert not [word for word in re.findall(r"[\w/.]+", QUOTED.sub("", text), re.ASCII) if len(word) > 28]
