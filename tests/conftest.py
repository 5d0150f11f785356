"""What all tests share: `support` beside this file is importable. Where pytest-xdist runs tests side by side (as in
`make test`, with --dist loadgroup), those of one folder stay together, since they share a ComfyUI, or pools; unit tests
of one file do."""

from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process")


def pytest_collection_modifyitems(items):
    for item in items:
        folder, *_ = item.path.relative_to(HERE).parts
        item.add_marker(pytest.mark.xdist_group(item.path.stem if folder == "unit" else folder))


def pytest_terminal_summary(terminalreporter):
    """What was skipped, and why: a line per folder and reason."""
    skipped = terminalreporter.stats.get("skipped", ())
    why = Counter((report.location[0].rpartition("/")[0], report.longrepr[2]) for report in skipped)
    for (folder, reason), count in sorted(why.items()):
        terminalreporter.write_line(f"skipped: {count} in {folder}: {reason.removeprefix('Skipped: ')}")
