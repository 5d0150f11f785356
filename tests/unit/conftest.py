"""What the unit tests share. One thread: tensors are small here, and threads that wait for each other are slow on a
busy machine."""

import pytest
import torch
from channels import Pair
from formats import MINI
from small_library import world  # noqa: F401 - a fixture

from fastusp_backend.models.synthetic import write_checkpoint

torch.set_num_threads(1)


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
    write_checkpoint(str(path), MINI, seed=1)
    return path
