"""What `plan --free` predicts, beside what was measured (benchmarks/results)."""

import pytest
import torch

from fastusp_backend.cli.plan import H100_TFLOPS, Step
from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.models.cost import step_cost
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import FLUX2_DEV, FLUX_DEV, QWEN_IMAGE
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


def predicted(config, ranks, link, *, dtype=torch.bfloat16, **room):
    with torch.device("meta"):
        model = config.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}
    spec = ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16")
    found = place_file(header, spec, ranks, **room)
    return found, Step(header, config, ranks, H100_TFLOPS).seconds(found, link) * 1000


@pytest.mark.parametrize(
    "config, link, room, blocks, measured",
    [
        (FLUX_DEV, "NVLink", {}, 0, 68.5),
        (FLUX_DEV, "NVLink", {"available": 13_100_000_000}, 52, 70.8),
        (FLUX2_DEV, "NVLink", {}, 0, 238),
        (FLUX2_DEV, "NVLink", {"available": 36_000_000_000}, 54, 251.6),
        (FLUX_DEV, "PCIe 5", {"peers": False}, 0, 103.5),
        (FLUX_DEV, "PCIe 5", {"peers": False, "available": 13_000_000_000}, 28, 254),
    ],
)
def test_within_a_fifth_of_what_was_measured(config, link, room, blocks, measured):
    found, ms = predicted(config, 2, link, **room)
    assert abs(len(found.slabs) - blocks) <= 2 and ms == pytest.approx(measured, rel=0.2)


def test_a_file_in_fp8_takes_longer():
    slow, quick = (predicted(FLUX_DEV, 2, "NVLink", dtype=t)[1] for t in (torch.float8_e4m3fn, torch.bfloat16))
    assert slow / quick == pytest.approx(1.33)


def test_operations_are_those_of_the_papers_formulas():
    """FLUX.1: per token 24 C^2 in each stream of a double block, of which either has its own, and in a single block."""
    tokens, c = 4096 + 512, 3072
    products = 2 * 12 * c * c * tokens * (19 + 38)
    attention = 4 * tokens**2 * c * 57
    cost = step_cost(FLUX_DEV, 2, size=(1024, 1024), text=512)
    assert cost.flops == pytest.approx(products + attention, rel=1e-6)
    assert cost.sent_bytes == 57 * 2 * 4 * (tokens / 2) * c / 2
    assert step_cost(QWEN_IMAGE, 1, size=(1024, 1024), text=35).sent_bytes == 0


def test_weights_from_the_host_come_over_its_own_link():
    room = {"peers": False, "available": 12_000_000_000}
    found, ms = predicted(FLUX_DEV, 2, "NVLink", **room)
    assert found.source == "host" and ms == pytest.approx(found.streamed_bytes / 50e6)
    assert predicted(FLUX_DEV, 2, "PCIe 5", **room)[1] > ms + 60  # tokens too


def test_one_gpu_sends_nothing():
    found, ms = predicted(FLUX_DEV, 1, "PCIe 4")
    assert ms == predicted(FLUX_DEV, 1, "NVLink")[1]
