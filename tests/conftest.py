"""What all tests share: `support` beside this file is importable. Where pytest-xdist runs tests side by side, those of
one folder stay together, since they share a ComfyUI (two groups of them: with its page, and without), or pools (three:
pools' lives, what they compute, and servers, whose tests wait most of the time); unit tests of one file do, and
commands that start all they need."""

import contextlib
import gc
from collections import Counter
from pathlib import Path

import pytest

gc.disable()  # until all tests are imported, as `importing` of the workers does it, for the same reason

HERE = Path(__file__).parent
ORDER = ("host", "dist", "unit", "chaos", "mutations", "gpu")
"""Of the folders: each of xdist's processes takes the next group, and the longest begin first."""
LIVES = ("tests/dist/test_pool_", "tests/dist/test_changing_files", "tests/dist/test_residency")
SERVERS = ("tests/dist/test_serve", "tests/dist/test_several_machines", "tests/dist/test_machines_end")
WITH_PAGE = "browser choose controls convert demo examples locales measure pages templates".split()
PAGES = tuple(f"tests/host/test_host_{name}" for name in WITH_PAGE)
BY_FILE = ("tests/unit/", "tests/dist/test_chaos", "tests/dist/test_cli", "tests/dist/test_benchmarks")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(HERE).parts[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One of our own: --dist loadgroup groups nothing with pytest 9.2, without a word (pytest-xdist 3.8)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            if path.startswith(BY_FILE):
                return path
            groups = {"/lives": LIVES, "/servers": SERVERS, "/pages": PAGES}
            return path.rpartition("/")[0] + "".join(name for name, of in groups.items() if path.startswith(of))

    config.option.loadscopereorder = False  # nothing before those that take longest
    return Scheduler(config, log)


@pytest.fixture(scope="session")
def network():
    """Three machines, see `machines`."""
    import machines  # not before `gc.disable`: PyTorch comes with it

    with contextlib.ExitStack() as made:
        try:
            made.enter_context(machines.network(3))
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield


def pytest_terminal_summary(terminalreporter):
    """What was skipped, and why: a line per folder and reason."""
    skipped = terminalreporter.stats.get("skipped", ())
    why = Counter((report.location[0].rpartition("/")[0], report.longrepr[2]) for report in skipped)
    for (folder, reason), count in sorted(why.items()):
        terminalreporter.write_line(f"skipped: {count} in {folder}: {reason.removeprefix('Skipped: ')}")
