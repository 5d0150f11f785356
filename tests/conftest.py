"""What all tests share: `support` beside this file is importable."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    """What was skipped, and why: a line per folder and reason."""
    skipped = terminalreporter.stats.get("skipped", ())
    why = Counter((report.location[0].rpartition("/")[0], report.longrepr[2]) for report in skipped)
    for (folder, reason), count in sorted(why.items()):
        terminalreporter.write_line(f"skipped: {count} in {folder}: {reason.removeprefix('Skipped: ')}")
