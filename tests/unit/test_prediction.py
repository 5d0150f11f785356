"""What `plan` predicts, beside what was measured (benchmarks/results)."""

import pytest
import torch

from fastusp_backend.cli.prediction import CARDS, PCIE, Prediction, known_card
from fastusp_backend.config import FileState, Layout, ModelSpec
from fastusp_backend.models.cost import step_cost
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import FLUX2_DEV, FLUX_DEV, QWEN_IMAGE, Z_IMAGE
from fastusp_backend.planner import plan_batches
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


NVLINK = CARDS["H100"].nvlink


def predicted(config, ranks, link=NVLINK, *, dtype=torch.bfloat16, linear="exact", prompts=1, ring=0, **room):
    with torch.device("meta"):
        model = config.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}
    spec = ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16", linear=linear)
    found = place_file(header, spec, ranks, **room)
    made = Prediction(header, config, plan_batches(ranks, config.heads, ring=ring), CARDS["H100"], linear)
    return found, made.seconds(found, link, prompts=prompts) * 1000


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "config, ranks, given, blocks, measured",
    [
        (FLUX_DEV, 1, {}, 0, 119.8),
        (FLUX_DEV, 2, {}, 0, 68.5),
        (FLUX_DEV, 2, {"available": 13_100_000_000}, 52, 70.8),
        (FLUX_DEV, 2, {"linear": "fp8"}, 0, 52.0),
        (FLUX_DEV, 1, {"dtype": FP8}, 0, 138.8),
        (FLUX_DEV, 1, {"dtype": FP8, "peers": False, "available": 10_300_000_000}, 14, 138.8),
        (FLUX_DEV, 2, {"dtype": FP8}, 0, 91.1),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False}, 0, 103.5),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "available": 18_600_000_000}, 10, 119.7),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "available": 13_000_000_000}, 28, 213.1),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "available": 4_600_000_000}, 57, 384.0),
        (FLUX2_DEV, 2, {}, 0, 238),
        (FLUX2_DEV, 2, {"available": 36_000_000_000}, 54, 251.6),
        (QWEN_IMAGE, 2, {"prompts": 2}, 0, 121.2),
    ],
)
def test_within_a_fifth_of_what_was_measured(config, ranks, given, blocks, measured):
    found, ms = predicted(config, ranks, **given)
    assert abs(len(found.slabs) - blocks) <= 2 and ms == pytest.approx(measured, rel=0.2)


def test_two_prompts_side_by_side_or_one_behind_the_other():
    """Beside each other no tokens travel, whatever the link; of three ranks none are left over."""
    (_, slow), (_, quick) = (predicted(FLUX_DEV, 2, link, prompts=2) for link in (PCIE[-1], NVLINK))
    assert slow == quick == pytest.approx(predicted(FLUX_DEV, 1)[1])
    for more in ({"link": PCIE[0]}, {}):
        assert predicted(FLUX_DEV, 3, prompts=2, **more)[1] == pytest.approx(2 * predicted(FLUX_DEV, 3, **more)[1])
    ring = {"ring": 2, "link": PCIE[-1]}  # of both ranks, so that no batch groups are left
    assert predicted(FLUX_DEV, 2, prompts=2, **ring)[1] == pytest.approx(2 * predicted(FLUX_DEV, 2, **ring)[1])


def test_a_slow_bridge_decides():
    room = {"available": 21_000_000_000}
    found, ms = predicted(QWEN_IMAGE, 2, CARDS["RTX 3090"].nvlink, **room)
    assert found.source == "shared" and ms > found.streamed_bytes / 45e6 > 2 * predicted(QWEN_IMAGE, 2, **room)[1]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", None),
    ],
)
def test_cards_by_the_names_that_nvml_gives(name, card):
    assert known_card(name) == card


def test_operations_are_those_of_the_papers_formulas():
    """FLUX.1: per token 24 C^2 in each stream of a double block, of which either has its own, and in a single block."""
    tokens, c = 4096 + 512, 3072
    products = 2 * 12 * c * c * tokens * (19 + 38)
    attention = 4 * tokens**2 * c * 57
    cost = step_cost(FLUX_DEV, Layout(ulysses=2, ring=1), size=(1024, 1024), text=512)
    assert cost.flops == pytest.approx(products + attention, rel=1e-6)
    assert cost.sent_bytes == 57 * 2 * 4 * (tokens / 2) * c / 2
    assert cost.parameters == 2 * 12 * c * c * 19 + 12 * c * c * 38
    around = step_cost(FLUX_DEV, Layout(ulysses=1, ring=4), size=(1024, 1024), text=512)
    assert around.sent_bytes == 57 * 2 * 2 * (tokens / 4) * c * 3
    assert step_cost(QWEN_IMAGE, Layout(ulysses=1, ring=1), size=(1024, 1024), text=35).sent_bytes == 0


def test_blocks_of_the_image_alone_cost_its_tokens():
    """Z-Image's first two; both streams are filled up to a multiple of 32."""
    cost = step_cost(Z_IMAGE, Layout(ulysses=2, ring=1), size=(1024, 1008), text=35)
    image, tokens, width = 4032, 4096, 3840
    weights = 4 * width**2 + 3 * width * 10240
    assert cost.parameters == 32 * weights
    seen = ((2, image), (30, tokens))
    assert cost.flops == pytest.approx(sum(n * (2 * weights * seen + 4 * seen**2 * width) for n, seen in seen))
    assert cost.sent_bytes == pytest.approx(sum(n * seen for n, seen in seen) / 2 * width * 2 * 2)


def test_weights_from_the_host_come_over_its_own_link():
    room = {"peers": False, "available": 12_000_000_000}
    found, ms = predicted(FLUX_DEV, 2, **room)
    assert found.source == "host" and ms == pytest.approx(found.streamed_bytes / 50e6)
    assert predicted(FLUX_DEV, 2, PCIE[0], **room)[1] > ms + 30  # tokens too


def test_one_gpu_sends_nothing():
    found, ms = predicted(FLUX_DEV, 1, PCIE[1])
    assert ms == predicted(FLUX_DEV, 1)[1]
