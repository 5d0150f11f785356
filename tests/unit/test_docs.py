"""Every page: its links lead somewhere, the files that it names exist, its commands are understood, its words are a
user's; README stays short."""

import argparse
import importlib
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastusp_backend.keyfile import Key

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/results"  # of what was so on a day
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "web/docs/**/*.md", "benchmarks/**/*.md")
    for page in sorted(ROOT.glob(pattern))
    if not page.name.startswith(".")
]
LIVING = [page for page in PAGES if page.parent != RECORDS and page.name != "CHANGELOG.md"]
DEVELOPERS = [ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md", *sorted(ROOT.glob("docs/design/*.md"))]
"""These name modules as `room/module`; in pages for users `models/vae` is a folder of ComfyUI's."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:fastusp_backend|nodes|tests|web|docs|benchmarks|example_workflows)/[\w./-]*)`")
MODULE = re.compile(
    r"`((?:attention|cli|comm|engine|kernels|models|pool|protocol|sampling|weights|worker)/\w+)(?:\.\w+)*`"
)
COMMAND = re.compile(r"python -m fastusp_backend (\w+) ([^`\n]+)|`(bench|plan|verify) (FILE[^`\n]*)`")
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
ODD = re.compile(r"\b(stands?|stood|mend(s|ed|ing)?|cannot be had|can be had)\b", re.IGNORECASE)
PICTURE = 200_000
"""Bytes: pages open on slow links, too."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(page: Path) -> str:
    """A page without what it quotes: code, and messages in backticks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def is_there(path: str) -> bool:
    """path: of a file, a folder, or a module without its ending."""
    return (ROOT / path).exists() or (ROOT / f"{path.partition('.')[0]}.py").exists()


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_the_files_that_it_names_exist(page):
    assert not [file for file in FILE.findall(page.read_text(encoding="utf-8")) if not is_there(file)]


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_the_tests_that_it_names_exist(page):
    for file, test in TEST.findall(page.read_text(encoding="utf-8")):
        (path,) = ROOT.glob(f"tests/*/{file}")
        assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("page", DEVELOPERS, ids=name)
def test_the_modules_that_it_names_exist(page):
    modules = MODULE.findall(page.read_text(encoding="utf-8"))
    assert not [module for module in modules if not is_there(f"fastusp_backend/{module}")]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The command lines that have arguments: (command, arguments), with 1 for each of a shell's variables."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for match in COMMAND.finditer(text):
        command, line = match[1] or match[3], re.sub(r"\\?\$\w+", "1", match[2] or match[4])
        for quote in "'\"":
            if line.count(quote) % 2:  # it ends a line that another command is given
                line = line.rpartition(quote)[0]
        found.append((command, shlex.split(line, comments=True)))
    return found


@pytest.mark.parametrize("page", [page for page in LIVING if commands(page)], ids=name)
def test_the_commands_that_it_names_are_understood(page):
    for command, arguments in commands(page):
        parser = argparse.ArgumentParser(prog=command, allow_abbrev=False)
        importlib.import_module(f"fastusp_backend.cli.{command}").add_arguments(parser)
        parser.parse_args(arguments)


def test_commands_are_found_where_pages_have_them():
    """In blocks, in what Slurm and MPI start, and in sentences."""
    several = [(command, arguments[:1]) for command, arguments in commands(ROOT / "docs/several-machines.md")]
    assert [command for command, _ in several].count("serve") == 5 and ("plan", ["FILE"]) in several
    assert several.count(("bench", ["FILE"])) == 2
    assert ("plan", ["FILE", "--card", "RTX 4090"]) in [(x, [*y[:1], *y[-2:]]) for x, y in commands(ROOT / "README.md")]


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_its_words_are_a_users(page):
    assert not [match[0] for match in ODD.finditer(prose(page))]


def test_readme_is_read_to_the_end():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 750 <= sum(len(line.split()) for line in lines if not line.startswith("|")) <= 900  # tables are looked up


def test_pictures_are_small():
    pictures = [file for file in (ROOT / "docs/images").iterdir() if file.is_file()]
    assert pictures and all(picture.stat().st_size < PICTURE for picture in pictures)


def test_every_page_of_docs_is_in_its_index():
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text("utf-8"))}
    assert {page.resolve() for page in (ROOT / "docs").glob("**/*.md")} - {index} <= listed


FRESH = """
set -e
umask 022
git() { mkdir ComfyUI-FastUSP && cp "$ROOT/requirements.txt" ComfyUI-FastUSP; }
python3() { [ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && touch "$3/bin/activate"; }
pip() { [ "$1 $2 $3" = "install torch -r" ] && cat "$4"; }
scp() { cp --no-preserve=all -T "$FIRST/${1#gpubox:}" "$2" && chmod 600 "$2"; }
python() { echo "$@"; "$PYTHON" -c 'from fastusp_backend.keyfile import Key, usual_path; Key.read(usual_path())'; }
"""


def test_two_fresh_machines(tmp_path):
    """The lines of the page, from a clone to the second machine's key file, where neither has a folder for it."""
    page = (ROOT / "docs/several-machines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    clone, scp = (next(x for x in blocks if words in x) for words in ("git clone", "scp gpubox:.config/fastusp/key ~"))
    home, first = tmp_path / "home", tmp_path / "first"
    home.mkdir()
    Key.read_or_make(first / ".config/fastusp/key")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "FIRST": str(first), "ROOT": str(ROOT)}
    env |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", FRESH + clone + scp]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "msgspec" in done.stdout and "--node-rank 1 " in done.stdout, done.stderr
    assert stat.S_IMODE((home / ".config/fastusp").stat().st_mode) == 0o700


SLURM = """
SLURM_JOB_NODELIST=node[1-2] SLURM_NNODES=2 on=node1
scontrol() { printf 'node1\\nnode2\\n'; }
getent() { [ "$2" = "$on" ] && echo "127.0.1.1 STREAM $2" || echo "10.0.0.5 STREAM $2"; }
srun() {
    for word in "$@"; do
        case $word in
            --nodelist=*) on=${word#*=} ;;
            getent) "${@: -3}" ;;
            exec*) echo "$word" ;;
        esac
    done
}
"""


def test_slurm_finds_an_address_that_others_reach():
    """A machine has its own name as 127.0.1.1, as Debian's /etc/hosts says."""
    page = (ROOT / "docs/several-machines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(#SBATCH .*?)^```", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run(["bash", "-c", SLURM + block], capture_output=True, text=True, timeout=10, check=True)
    assert "--nnodes 2 " in done.stdout and "--rdzv-endpoint 10.0.0.5:8189 " in done.stdout, done.stdout + done.stderr
