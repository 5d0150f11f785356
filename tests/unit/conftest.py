"""What the unit tests share. One thread: tensors are small here, and threads that wait for each other are slow on a
busy machine."""

from pathlib import Path

import pytest
import torch
from channels import Pair
from formats import MINI
from small_library import world  # noqa: F401 - a fixture

from fastusp_backend.models.synthetic import write_flux

torch.set_num_threads(1)

ANY_PROCESSOR = """
    account bench cause channel_refusals comfyui command_line config control devices doctor doctor_facts documents
    errors following fuzzed_headers gguf_header hangs large_headers link no_driver once originals other_files planner
    pool_log pool_parts ports readme rundir visible walls watch worker_ends workflows
""".split()
"""Tests of text, headers, sockets and processes: nothing is computed in them, or copied, that another processor's
vector instructions could make something else of. `make test-portable` leaves them out; what is not named here is in
it."""


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    for item in items:
        if item.path.parent == folder and item.path.stem.removeprefix("test_") in ANY_PROCESSOR:
            item.add_marker("any_processor")


@pytest.fixture
def pair():
    """A client's channel and a worker's."""
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A plain file of the model whose formats are tested; not to be written to."""
    path = tmp_path_factory.mktemp("formats") / "mini.safetensors"
    write_flux(str(path), MINI, seed=1)
    return path
