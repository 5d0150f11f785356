"""What `plan` predicts, beside what was measured (benchmarks/results)."""

from functools import cache

import pytest
import torch

from fastusp_backend.config import FileState, Layout, ModelSpec
from fastusp_backend.models.cost import step_cost
from fastusp_backend.models.detection import FAMILIES
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.prediction import (
    CARDS,
    MESSAGE,
    PCIE,
    TURN,
    Network,
    Prediction,
    fewer_are_faster,
    in_milliseconds,
    known_card,
    link_of,
    slowest_card,
)
from fastusp_backend.models.synthetic import (
    CHROMA,
    FLUX2_DEV,
    FLUX_DEV,
    QWEN_IMAGE,
    SD35_LARGE,
    Z_IMAGE,
)
from fastusp_backend.planner import plan_batches
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


NVLINK = CARDS["H100"].nvlink


@cache
def placed(config, ranks, dtype, linear, **room):
    """(the header of a file, where its weights lie): models of full size take a while to make."""
    with torch.device("meta"):
        model = config.build()
    header = {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}
    spec = ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16", linear=linear)
    return header, place_file(header, spec, ranks, **room)


def predicted(
    config,
    ranks,
    link=NVLINK,
    *,
    card="H100",
    dtype=torch.bfloat16,
    linear="exact",
    wire="exact",
    prompts=1,
    ring=0,
    **room,
):
    header, found = placed(config, ranks, dtype, linear, **room)
    made = Prediction(header, config, plan_batches(ranks, config.heads, ring=ring), CARDS[card], linear, wire)
    return found, made.seconds(found, link, prompts=prompts) * 1000


def across(machines: int, each: int, gigabits: float, **given) -> float:
    """Milliseconds of a step of FLUX.1 on several machines of H100s."""
    ranks, prompts = machines * each, given.pop("prompts", 1)
    layouts = plan_batches(ranks, FLUX_DEV.heads, per_machine=each, **given)
    found, _ = predicted(FLUX_DEV, ranks)
    made = Prediction(HEADER, FLUX_DEV, layouts, CARDS["H100"], "exact")
    return 1000 * made.seconds(found, NVLINK, prompts=prompts, network=Network(each, gigabits / 8))


HEADER = {"x": TensorInfo((1,), torch.bfloat16)}


def test_a_network_takes_what_a_ring_sends_that_attention_does_not_hide():
    """Keys and values of a quarter of FLUX.1's 4608 tokens, 3 turns, 57 blocks, of 2 GPUs at a time."""
    turned = 4608 / 4 * 3072 * 2 * 2 * 57 * 2
    hidden = across(2, 2, 1e9)
    assert 1000 * turned / (10 / 8 * 1e9) == pytest.approx(across(2, 2, 10) - hidden, rel=0.03)
    assert across(2, 2, 10) > across(2, 2, 25) > across(2, 2, 100) > across(2, 2, 400) > hidden
    assert hidden == pytest.approx(predicted(FLUX_DEV, 4)[1], rel=0.2)  # as on one machine


def test_a_network_takes_nothing_of_batch_groups():
    assert across(2, 2, 1, prompts=2) == pytest.approx(predicted(FLUX_DEV, 2)[1])


def test_messages_inside_a_machine_take_no_turn_of_the_network():
    """Of layouts that compute alike, and have as many messages but for the last."""
    fast = {layout: across(2, 4, 1e9, ulysses=layout, ring=8 // layout) for layout in (4, 8)}
    inside = predicted(FLUX_DEV, 8)[1]
    assert fast[8] - inside == pytest.approx(57 * 7 * 1000 * TURN, rel=0.01)
    assert fast[4] - inside == pytest.approx(57 * 1000 * (TURN - 3 * MESSAGE), rel=0.01)


def test_ulysses_between_machines_is_waited_for():
    """As many bytes as the ring's, which attention hides a part of, or all."""
    for gigabits in (25, 100, 400):
        assert across(2, 2, gigabits, ulysses=4, ring=1) > across(2, 2, gigabits)
        assert across(2, 1, gigabits, ulysses=2, ring=1) > across(2, 1, gigabits)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "config, ranks, given, measured",
    [
        (FLUX_DEV, 1, {}, 118.6),
        (FLUX_DEV, 2, {}, 66.2),
        (FLUX_DEV, 4, {}, 35.7),
        (FLUX_DEV, 8, {}, 20.3),  # one rank's share, played
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False}, 82.8),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "wire": "int8"}, 70.9),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "ring": 2}, 88.0),
        (FLUX_DEV, 2, {"link": PCIE[0], "peers": False, "ring": 2, "wire": "int8"}, 73.8),
        (FLUX_DEV, 4, {"link": PCIE[0], "peers": False}, 71.4),
        (FLUX_DEV, 4, {"link": PCIE[0], "peers": False, "wire": "int8"}, 50.4),
        (QWEN_IMAGE, 2, {"link": PCIE[0], "peers": False}, 98.3),
        (QWEN_IMAGE, 2, {"link": PCIE[0], "peers": False, "wire": "int8"}, 82.3),
        (FLUX_DEV, 1, {"linear": "fp8"}, 84.2),
        (FLUX_DEV, 2, {"linear": "fp8"}, 47.0),
        (FLUX2_DEV, 1, {}, 432.9),
        (FLUX2_DEV, 1, {"linear": "fp8"}, 274.2),
        (FLUX2_DEV, 2, {}, 225.6),
        (FLUX2_DEV, 2, {"link": PCIE[0], "peers": False}, 228.5),
        (FLUX2_DEV, 4, {}, 117.5),  # played
        (FLUX2_DEV, 8, {}, 64.4),
        (QWEN_IMAGE, 1, {}, 117.9),
        (QWEN_IMAGE, 2, {}, 67.0),
        (QWEN_IMAGE, 4, {}, 41.2),
        (QWEN_IMAGE, 8, {}, 25.5),  # played
        (SD35_LARGE, 1, {}, 57.6),
        (SD35_LARGE, 2, {}, 32.8),
        (Z_IMAGE, 1, {}, 89.3),
        (Z_IMAGE, 2, {}, 50.3),
        (FLUX_DEV, 1, {"card": "H100"}, 125),
        (FLUX_DEV, 2, {"card": "H100"}, 66.3),
    ],
)
def test_within_a_twentieth_where_weights_stay(config, ranks, given, measured):
    found, ms = predicted(config, ranks, **{"card": "H200"} | given)
    assert not found.slabs and ms == pytest.approx(measured, rel=0.05)


def test_few_rows_wait_for_their_weights():
    """Text's 256 tokens on eight GPUs, 60 blocks: more on a card with the same products and slower memory."""
    text = step_cost(QWEN_IMAGE, Layout(ulysses=8, ring=1), size=(1024, 1024), text=256).text_parameters
    slow, quick = (predicted(QWEN_IMAGE, 8, card=card)[1] for card in ("H100", "H200"))
    assert slow - quick == pytest.approx(1000 * 2 * text / 0.8 * (1 / 3.35e12 - 1 / 4.8e12))
    assert predicted(QWEN_IMAGE, 1, card="H100") == predicted(QWEN_IMAGE, 1, card="H200")


def test_efficiency_falls_with_the_number_of_gpus():
    """As measured: 0.90, 0.83 and 0.73 of one GPU's time by their number."""
    alone = predicted(FLUX_DEV, 1)[1]
    shares = [alone / predicted(FLUX_DEV, ranks)[1] / ranks for ranks in (2, 4, 8)]
    assert shares == pytest.approx([0.90, 0.83, 0.73], abs=0.03)


@pytest.mark.parametrize(
    "config, ranks, given, blocks, measured",
    [
        (FLUX_DEV, 1, {}, 0, 119.8),
        (FLUX_DEV, 2, {}, 0, 68.5),
        (FLUX_DEV, 2, {"available": 13_100_000_000}, 52, 70.8),
        (FLUX_DEV, 2, {"linear": "fp8"}, 0, 52.0),
        (FLUX_DEV, 2, {"dtype": FP8}, 0, 71.0),  # H200
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
        ("NVIDIA A100-PCIE-40GB", None),
        ("GRID A100-10C", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", None),
    ],
)
def test_cards_by_the_names_that_nvml_gives(name, card):
    assert known_card(name) == card


def test_the_slowest_of_several_cards():
    assert slowest_card(["NVIDIA H200", "NVIDIA GeForce RTX 3090", "NVIDIA H100 80GB HBM3"]) == "RTX 3090"
    assert slowest_card(["NVIDIA H200", "Tesla T4"]) is None


@pytest.mark.parametrize(
    ("card", "words", "pcie", "name"),
    [
        ("H100", ["NV18"], [(5, 16), (5, 16)], "NVLink, PCIe 5 x16"),
        ("RTX 3090", ["NV4", "PHB", "PHB"], [(4, 16), (4, 8), (4, 16)], "PCIe 4 x8"),  # a pair is joined, of three
        ("RTX 5090", ["PHB"], [(5, 8), (4, 16)], "PCIe 5 x8"),  # as fast as the other
        ("RTX 5090", ["PHB"], [(3, 16), (4, 4)], "PCIe 4 x4"),
        ("RTX 4090", ["SYS"], [None, None], "PCIe 4 x16"),
        ("H100", ["SYS"], [None, (5, 16)], "PCIe 5 x16"),
    ],
)
def test_links_by_what_nvml_tells(card, words, pcie, name):
    assert str(link_of(CARDS[card], words, pcie)) == name


def test_rates_of_pcie():
    assert [link.peers for link in PCIE] == [50, 25, 12.5] == [link.host for link in PCIE]


def test_digits_of_a_prediction():
    assert list(map(in_milliseconds, (0.00027, 0.00301, 0.00949, 0.0096, 0.0654))) == ["0.27", "3.0", "9.5", "10", "65"]


def test_fewer_gpus_that_are_faster():
    assert fewer_are_faster([{1: 3.0, 2: 2.0, 4: 1.0}], 4) is None
    assert fewer_are_faster([{1: 1.0, 2: 1.05}], 2) is None  # by less than predictions are right to
    assert fewer_are_faster([{1: 1.5, 2: 1.0, 4: 2.0}], 4) == 2
    assert fewer_are_faster([{1: 1.0, 2: 1.1, 4: 2.0}, {1: 5.0, 2: 2.0, 4: 3.0}], 4) == 2  # in both kinds of steps


def test_steps_are_of_as_much_text_as_is_usual():
    """Chroma's blocks are FLUX.1's, and its prompts shorter: ComfyUI does not pad them."""
    assert {family.family: family.text for family in FAMILIES} == {
        "FLUX.1": 512,
        "FLUX.2": 512,
        "Chroma": 128,
        "Qwen-Image": 256,
        "Stable Diffusion 3": 154,
        "Z-Image": 128,
    }
    ratio = predicted(CHROMA, 1)[1] / predicted(FLUX_DEV, 1)[1]
    assert (4096 + 128) / (4096 + 512) * 0.97 < ratio < (4096 + 128) / (4096 + 512) * 1.02


def test_weights_from_the_host_come_over_its_own_link():
    room = {"peers": False, "available": 12_000_000_000}
    found, ms = predicted(FLUX_DEV, 2, **room)
    assert found.source == "host" and ms == pytest.approx(found.streamed_bytes / 50e6)
    assert predicted(FLUX_DEV, 2, PCIE[0], **room)[1] > ms + 30  # tokens too


def test_one_gpu_sends_nothing():
    found, ms = predicted(FLUX_DEV, 1, PCIE[1])
    assert ms == predicted(FLUX_DEV, 1)[1]
