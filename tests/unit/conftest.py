"""What the unit tests share. One thread: tensors are small here, and threads that wait for each other are slow on a
busy machine."""

import pytest
import torch
from channels import Pair

torch.set_num_threads(1)


@pytest.fixture
def pair():
    """A client's channel and a worker's."""
    pair = Pair()
    yield pair
    pair.close()
