"""The list of small wrong changes fits the code as it is. (`python -m tests.mutations` makes them.)"""

from pathlib import Path

import pytest

from tests.mutations.changes import CHANGES

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_enough_over_all_rooms():
    rooms = {change.file.rpartition("/")[0] for change in CHANGES}
    backend = {f"fastusp_backend/{room}" for room in ("attention", "comm", "engine", "kernels", "models", "pool")}
    backend |= {f"fastusp_backend/{room}" for room in ("protocol", "sampling", "weights", "worker", "cli")}
    assert len(CHANGES) >= 60 and rooms >= backend | {"fastusp_backend", "nodes"}
    assert len({str(change) for change in CHANGES}) == len(CHANGES)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_can_be_made(change):
    compile(change.applied((ROOT / change.file).read_text(encoding="utf-8")), change.file, "exec")
    for test in change.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file() and f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), test
