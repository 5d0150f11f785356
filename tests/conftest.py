"""What all tests share: `support` beside this file is importable. Where pytest-xdist runs tests side by side (as in
`make test`, with --dist loadgroup), those of one folder stay together, since they share a ComfyUI, or pools; unit tests
of one file do."""

from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ORDER = ("dist", "host", "unit", "chaos", "mutations", "gpu")
"""Of the folders. xdist gives each of two workers the first group that is left, and the next one at once: the two long
ones come first, so that neither waits for the other."""


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.index(_folder(item)))
    for item in items:
        folder = _folder(item)
        item.add_marker(pytest.mark.xdist_group(item.path.stem if folder == "unit" else folder))


def _folder(item) -> str:
    return item.path.relative_to(HERE).parts[0]


def pytest_terminal_summary(terminalreporter):
    """What was skipped, and why: a line per folder and reason."""
    skipped = terminalreporter.stats.get("skipped", ())
    why = Counter((report.location[0].rpartition("/")[0], report.longrepr[2]) for report in skipped)
    for (folder, reason), count in sorted(why.items()):
        terminalreporter.write_line(f"skipped: {count} in {folder}: {reason.removeprefix('Skipped: ')}")
