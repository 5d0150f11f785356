"""What `plan` predicts where tokens go through the host's memory, beside other things that do or do not."""

import itertools

import pytest
from test_prediction import HEADER, predicted

from fastusp_backend.models.prediction import CARDS, PCIE, Link, Network, Prediction, pcie_of
from fastusp_backend.models.synthetic import FLUX_DEV
from fastusp_backend.planner import plan_batches

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


def test_what_is_streamed_too_is_not_faster_than_what_is_whole():
    for ranks, link, room in itertools.product((2, 4, 8), PCIE, (10_000_000_000, 4_600_000_000)):
        whole, streamed = (predicted(FLUX_DEV, ranks, link, peers=False, **more) for more in ({}, {"available": room}))
        assert streamed[1] >= whole[1] and (streamed[0].streamed_bytes or room > 5e9)


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_waiting_makes_no_gpu_faster_than_one_that_never_waits(card):
    """GPUs that wait stay cooler; slow ones, which hardly wait, would seem more than twice as fast on two."""
    found, _ = predicted(FLUX_DEV, 2)
    apart = Link("never waited for", 1e6, 1e6, apart=True)
    for ranks, link in itertools.product((2, 4, 8), pcie_of(card)):
        made = Prediction(HEADER, FLUX_DEV, plan_batches(ranks, FLUX_DEV.heads), card, "exact")
        assert made.seconds(found, link) >= made.seconds(found, apart)


def test_all_gpus_of_a_machine_share_its_memory():
    """Those that evaluate another prompt, too, but not those of another machine."""
    alone, beside = (
        predicted(FLUX_DEV, 2, PCIE[0], peers=False)[1],
        predicted(FLUX_DEV, 4, PCIE[0], peers=False, prompts=2),
    )
    assert beside[1] > 1.05 * alone
    found, _ = predicted(FLUX_DEV, 4)
    made = Prediction(HEADER, FLUX_DEV, plan_batches(4, FLUX_DEV.heads, per_machine=2), CARDS["H100"], "exact")
    away = 1000 * made.seconds(found, PCIE[0], network=Network(2, 1e6))
    assert away < predicted(FLUX_DEV, 4, PCIE[0], peers=False)[1]
