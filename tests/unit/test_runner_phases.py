"""What a rank says of what it is at before a request's first step."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from fastusp_backend.protocol import Phase
from fastusp_backend.worker.runner import Runner

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("device, known, told", [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)])
def test_a_first_evaluation_says_that_it_compiles(device, known, told):
    """On GPUs; else it would count as loading."""
    engine, control = MagicMock(device=torch.device(device)), MagicMock()
    Runner(MagicMock(size=1), engine, control)._tell_of_compiling(SimpleNamespace(id=5), known)
    assert [call.args[0] for call in control.send.call_args_list] == told * [Phase(id=5, text="compiling")]
