"""How many weights are unpacked: all where they fit beside what is kept free, else as many as do."""

from dataclasses import replace

import msgspec
import pytest
import torch
from fake_workers import SPEC
from placing import header

from fastusp_backend.engine.room import Room, kept_free, settle
from fastusp_backend.models.files import model_and_plans, unpacked_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.synthetic import FLUX_DEV
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = pytest.mark.unit

BF16 = torch.bfloat16


def settled(free, *, ranks=2, config=FLUX_DEV, **spec):
    tensors = {
        name: TensorInfo(info.shape, torch.float8_e4m3fn if len(info.shape) == 2 else BF16)
        for name, info in header(config).items()
    }
    types = {"compute": "bfloat16", "storage": "bfloat16", "keep_quantised": True, "unpack": True} | spec
    wanted = msgspec.structs.replace(SPEC, **types)
    model, plans = model_and_plans(tensors, wanted)
    return settle(model, plans, wanted, ranks, Room(True, free)), model, plans, wanted


def test_where_it_fits_beside_what_is_kept_free():
    _, model, plans, spec = settled(None)
    wide = unpacked_plans(model, plans, spec)
    size, kept = max(Ownership(model, wide, 2).nbytes), kept_free(FLUX_DEV, wide.values(), 2).usual
    found, *_ = settled(size + kept)
    assert found.placement.unpacked and found.placement.device_bytes == size and found.plans == wide
    assert found.ownership.nbytes == Ownership(model, wide, 2).nbytes
    for free, more in ((None, {}), (size + kept, {"unpack": False})):
        found, *_ = settled(free, **more)
        assert not found.placement.unpacked and not found.placement.slabs and found.plans == plans
    for weights in ("shared", "host"):  # who asks for these wants room
        found, *_ = settled(1 << 40, weights=weights)
        assert not found.placement.unpacked and found.placement.slabs
    assert settled(1 << 40, weights="whole")[0].placement.unpacked
    assert not settled(1 << 40, linear="fp8")[0].placement.unpacked, "the products take what is there"


def test_as_many_as_fit_where_not_all_do():
    _, model, plans, spec = settled(None)
    packed = max(Ownership(model, plans, 2).nbytes)
    wide = unpacked_plans(model, plans, spec)
    kept = max(kept_free(FLUX_DEV, forms.values(), 2).usual for forms in (plans, wide))
    more, largest = max(Ownership(model, wide, 2).nbytes) - packed, max(plan.nbytes for plan in plans.values())
    for part in (0.25, 0.5, 0.9):
        found, *_ = settled(packed + kept + int(part * more))
        assert part - 0.02 < found.placement.unpacked <= part and not found.placement.slabs
        assert f"whole, {100 * found.placement.unpacked:.0f} % of the weights unpacked, " in str(found.placement)
        took = found.placement.device_bytes - packed
        assert part * more - largest < took <= part * more
        assert max(found.ownership.nbytes) == packed + took
        forms = [(plan.small or plan, plan.small is not None) for plan in found.plans.values()]
        assert [form for form, _ in forms] == list(plans.values()) and {small for _, small in forms} == {True, False}
    assert "whole, 99 % of the weights unpacked, " in str(replace(found.placement, unpacked=0.999))
    for few in (packed + kept - 1, packed + kept + more // 200):  # too little to be told
        found, *_ = settled(few)
        assert not found.placement.unpacked and found.plans == plans


def test_files_in_16_bits_have_nothing_to_unpack():
    spec = msgspec.structs.replace(SPEC, compute="bfloat16", keep_quantised=True, unpack=True)
    model, plans = model_and_plans(header(FLUX_DEV), spec)
    found = settle(model, plans, spec, 2, Room(True, 1 << 40))
    assert found.plans == plans and not found.placement.unpacked
