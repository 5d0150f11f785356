"""Which blocks stay and which travel, by the room that there is."""

from dataclasses import replace

import msgspec
import pytest
import torch
from placing import header, placed, spec_with

from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.engine import room
from fastusp_backend.engine.room import Room, check_host_room, kept_free
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import model_and_plans, storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import PAGE, place, place_file, stream_count
from fastusp_backend.models.synthetic import FLUX2_DEV, FLUX_DEV, QWEN_IMAGE, TINY_FLUX
from fastusp_backend.weights import storage_plan
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]
GB = 10**9


def test_what_fits_stays():
    found = placed(FLUX_DEV, available=24 * GB)
    assert not found.slabs and found.source is None and found.streamed_bytes == 0
    assert str(found) == "whole, 20.6 GB a device"
    assert str(placed(TINY_FLUX, available=24 * GB)).endswith(" MB a device")


def test_no_more_of_three_ranks_blocks_travel_than_need_be():
    """Each fetches two thirds of a shared block."""
    with torch.device("meta"):
        model = FLUX_DEV.build()
    plans = storage_plans(model, header(FLUX_DEV), spec_with("auto"))
    for available in (18 * GB, 14 * GB, 11 * GB):
        found = placed(FLUX_DEV, 3, available=available)
        fewer = stream_count(model, plans, Ownership(model, plans, 3), "shared", len(found.slabs) - 1)
        assert found.device_bytes <= available < fewer.device_bytes


@pytest.mark.parametrize(
    "available, peers, source",
    [
        (20, True, "shared"),
        (18, False, "host"),
        (16, True, "shared"),
        (13, False, "host"),
        pytest.param(20, False, "host", marks=pytest.mark.thorough),
        pytest.param(18, True, "shared", marks=pytest.mark.thorough),
        pytest.param(16, False, "host", marks=pytest.mark.thorough),
        pytest.param(13, True, "shared", marks=pytest.mark.thorough),
    ],
)
def test_as_few_as_need_be_travel(available, peers, source):
    found = placed(FLUX_DEV, available=available * GB, peers=peers)
    assert found.source == source and 0 < len(found.slabs) <= found.blocks == 57
    assert found.device_bytes <= available * GB
    less = placed(FLUX_DEV, available=found.device_bytes - 1, peers=peers)
    assert len(less.slabs) > len(found.slabs) and less.device_bytes < found.device_bytes
    assert f"{57 - len(found.slabs)} of 57 blocks stay, {len(found.slabs)} " in str(found)


@pytest.mark.parametrize(("peers", "ranks"), [(False, 2), (True, 1), (True, 2)])
def test_room_for_larger_images_is_given_up_where_all_blocks_travel_alone(peers, ranks):
    """A few blocks from the host cost little."""
    whole = placed(FLUX_DEV, ranks, weights="whole").device_bytes
    shares = peers and ranks > 1
    found = placed(FLUX_DEV, ranks, peers=peers, available=whole - GB, spare=GB)
    assert found.source == ("shared" if shares else "host") and len(found.slabs) < 12
    for choice in ("shared", "host") if shares else ("host",):
        least = placed(FLUX_DEV, ranks, peers=peers, weights=choice).device_bytes
        found = placed(FLUX_DEV, ranks, peers=peers, available=least - GB, spare=GB)
        assert (found.source, len(found.slabs)) == (choice, 57)


def test_a_refusal_names_what_would_help():
    small = {name: TensorInfo(info.shape, torch.float8_e4m3fn) for name, info in header(FLUX_DEV).items()}
    for tensors, helps in ((header(FLUX_DEV), True), (small, False)):
        with pytest.raises(RequestError) as refused:
            place_file(tensors, spec_with("auto"), 2, available=GB)
        assert str(refused.value).startswith("Free memory of the GPUs")
        assert ("use linear = fp8 (GPUs from RTX 40" in str(refused.value)) == helps
    need = placed(FLUX_DEV, weights="host").device_bytes
    with pytest.raises(RequestError, match="0.1 GB more than are left"):
        placed(FLUX_DEV, available=need - 1)


def test_host_memory_takes_what_the_gpus_together_cannot():
    found = placed(FLUX2_DEV, available=22 * GB)
    assert found.source == "host" and found.device_bytes <= 22 * GB < placed(FLUX2_DEV, weights="shared").device_bytes


def test_they_are_spread_evenly():
    found = placed(FLUX2_DEV, available=60 * GB)
    blocks = [slab.block for slab in found.slabs]
    gaps = {b - a for a, b in zip(blocks, blocks[1:], strict=False)}
    assert blocks[0] == 0 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("config", [FLUX_DEV, FLUX2_DEV, QWEN_IMAGE])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_own_alike(config, ranks):
    found = placed(config, ranks, weights="shared")
    assert [slab.block for slab in found.slabs] == list(range(found.blocks))
    owned = [sum(slab.parts[rank] for slab in found.slabs) for rank in range(ranks)]
    assert max(owned) - min(owned) <= PAGE
    for slab in found.slabs:
        assert all(size % PAGE == 0 for size in slab.parts) and max(slab.parts) - min(slab.parts) <= PAGE
        assert set(slab.owners) == set(slab.offsets)
        places = sorted(slab.offsets.values())
        assert all(a % 256 == 0 and b % 256 == 0 for a, b in places) and places[-1][1] <= sum(slab.parts)
        assert all(first[1] <= second[0] for first, second in zip(places, places[1:], strict=False))
        for name, owner in slab.owners.items():  # it has most of it
            start, stop = slab.offsets[name]
            shares = []
            for rank in range(ranks):
                first = sum(slab.parts[:rank])
                shares.append(max(0, min(stop, first + slab.parts[rank]) - max(start, first)))
            assert shares[owner] == max(shares)


@pytest.mark.parametrize("count", range(1, 6))
def test_no_block_comes_over_the_one_that_computes(count):
    model_header = header(FLUX_DEV)
    spec = ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16")
    with torch.device("meta"):
        model = FLUX_DEV.build()
    plans = storage_plans(model, model_header, spec)
    slots = [slab.slot for slab in stream_count(model, plans, Ownership(model, plans, 2), "shared", count).slabs]
    assert all(slots[i] != slots[(i + 1) % count] for i in range(count)) or count == 1


def test_a_model_of_64_gb_on_two_cards_of_40_and_in_fp8_of_24():
    assert placed(FLUX2_DEV, available=38 * GB).device_bytes <= 38 * GB
    assert placed(FLUX2_DEV, available=22 * GB, dtype=torch.float8_e4m3fn).device_bytes <= 22 * GB


def test_host_memory_is_counted_once():
    found = placed(FLUX_DEV, 4, weights="host")
    assert found.host_bytes == pytest.approx(17.0 * GB, rel=0.03) and found.streamed_bytes <= found.host_bytes
    assert found.device_bytes < 4 * GB


def test_what_cannot_be_is_refused():
    with pytest.raises(RequestError, match="even with all blocks in host memory .* GB more than are left"):
        placed(FLUX2_DEV, available=3 * GB)
    for ranks, peers in ((1, True), (2, False)):
        with pytest.raises(RequestError, match="Set weights to host or auto"):
            placed(FLUX_DEV, ranks, weights="shared", peers=peers)


def test_whether_tokens_come_by_the_same_links():
    def beside(ranks, weights, **room):
        return placed(TINY_FLUX, ranks, weights=weights, **room).beside_tokens

    assert beside(2, "shared") and beside(2, "host", peers=False)
    assert not beside(2, "host", peers=True) and not beside(1, "host", peers=False) and not beside(2, "whole")


def test_what_a_gpu_keeps_for_all_else():
    """What evaluating takes, or reading: weights that are stored small are unpacked at each use."""
    spec = spec_with("auto")
    plans = {
        name: model_and_plans(header(FLUX2_DEV), msgspec.structs.replace(spec, **types))[1].values()
        for name, types in {"bf16": {}, "fp8": {"storage": "float8_e4m3fn"}, "products": {"linear": "fp8"}}.items()
    }
    largest = 6144 * 55296
    kept = {name: kept_free(FLUX2_DEV, found, 2) for name, found in plans.items()}
    tokens = room.WORKING_SET * room.KEPT_TOKENS // 2 * 6144 * 2
    assert kept["bf16"].usual == room.KEPT_FREE + tokens
    assert kept["fp8"].usual == kept["bf16"].usual + 2 * 2 * largest
    piece = 12 * (storage_plan.PIECE // 6144) * 6144
    reading = 2 * 2 * largest + piece + largest + 4 * 55296
    assert kept["products"].usual == max(room.LOADING_FREE + reading, kept["bf16"].usual)
    assert all(found.least < found.usual for found in kept.values())


@pytest.mark.parametrize(("linear", "helps"), [("exact", True), ("fp8", False)])
def test_host_memory_that_does_not_suffice(linear, helps):
    spec = msgspec.structs.replace(spec_with("host"), linear=linear)
    model, plans = model_and_plans(header(FLUX_DEV), spec)
    found = place(model, plans, Ownership(model, plans, 2), "host", peers=True)
    with pytest.raises(RequestError, match=r"^Free host memory, or use .* take \d+.\d GB of it, 8.0 GB are") as refused:
        check_host_room(found, plans, Room(False, None, 8 * GB))
    assert ("linear = fp8" in str(refused.value)) == helps
    check_host_room(found, plans, Room(False, None))


def test_guided_models_leave_room_for_a_prompt_on_half_of_the_ranks():
    schnell = replace(FLUX_DEV, guidance=False)
    plans = model_and_plans(header(FLUX_DEV), spec_with("auto"))[1].values()
    for config in (QWEN_IMAGE, schnell):  # as wide as FLUX_DEV
        guided, embedded = ([kept_free(c, plans, n) for n in (1, 2, 3, 4)] for c in (config, FLUX_DEV))
        assert guided == [embedded[0], embedded[0], embedded[2], embedded[1]]
