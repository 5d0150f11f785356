"""How long an evaluation may take, by what the last ones took."""

import time

import pytest
import torch

from fastusp_backend.engine import pace
from fastusp_backend.engine.pace import Pace
from fastusp_backend.pulse import COLD_CPU_SECONDS, COLD_SECONDS

pytestmark = pytest.mark.unit


def test_the_pace_of_a_step_is_known_when_it_was_taken():
    steady = Pace(torch.device("cpu"))
    assert steady.limit == COLD_CPU_SECONDS and Pace(torch.device("cuda")).limit == COLD_SECONDS
    with steady.measured():
        time.sleep(0.01)
    assert steady.limit == pace.SHORTEST_SECONDS
    steady._seconds.append(100.0)
    assert steady.limit == 100.0 * pace.TIMES_LONGER


def test_the_longest_of_the_last_ones_counts_and_older_ones_do_not():
    steady = Pace(torch.device("cpu"))
    for seconds in (100.0, 50.0, *7 * [1.0]):
        steady._seconds.append(seconds)
    assert steady.limit == 50.0 * pace.TIMES_LONGER
    steady._seconds.append(1.0)
    assert steady.limit == pace.SHORTEST_SECONDS
