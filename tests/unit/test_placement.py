"""Which blocks stay and which travel, by the room that there is."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.__main__ import main
from fastusp_backend.cli import inputs, plan
from fastusp_backend.config import FileState, Layout, ModelSpec
from fastusp_backend.devices import Devices
from fastusp_backend.engine.room import Room, check_host_room, kept_free
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import PAGE, place_file, stream_count
from fastusp_backend.models.synthetic import FLUX2_DEV, FLUX_DEV, QWEN_IMAGE, TINY_FLUX, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]
GB = 10**9


@functools.cache
def header(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = config.build()
    return {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}


def spec_with(weights):
    return ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16", weights=weights)


def placed(config, ranks=2, *, dtype=torch.bfloat16, weights="auto", **room):
    return place_file(header(config, dtype), spec_with(weights), ranks, **room)


def test_what_fits_stays():
    found = placed(FLUX_DEV, available=24 * GB)
    assert not found.slabs and found.source is None and found.streamed_bytes == 0
    assert str(found) == "whole, 20.6 GB a device"


def test_no_more_of_three_ranks_blocks_travel_than_need_be():
    """Each fetches two thirds of a shared block."""
    with torch.device("meta"):
        model = FLUX_DEV.build()
    plans = storage_plans(model, header(FLUX_DEV), spec_with("auto"))
    for available in (18 * GB, 14 * GB, 11 * GB):
        found = placed(FLUX_DEV, 3, available=available)
        fewer = stream_count(model, plans, Ownership(model, plans, 3), "shared", len(found.slabs) - 1)
        assert found.device_bytes <= available < fewer.device_bytes


@pytest.mark.parametrize("available", [20, 18, 16, 13])
@pytest.mark.parametrize("peers, source", [(True, "shared"), (False, "host")])
def test_as_few_as_need_be_travel(available, peers, source):
    found = placed(FLUX_DEV, available=available * GB, peers=peers)
    assert found.source == source and 0 < len(found.slabs) <= found.blocks == 57
    assert found.device_bytes <= available * GB
    less = placed(FLUX_DEV, available=found.device_bytes - 1, peers=peers)
    assert len(less.slabs) > len(found.slabs) and less.device_bytes < found.device_bytes
    assert f"{57 - len(found.slabs)} of 57 blocks stay, {len(found.slabs)} " in str(found)


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
    with pytest.raises(RequestError, match="though all blocks travel, the weights take .* GB more than are left"):
        placed(FLUX2_DEV, available=3 * GB)
    for ranks, peers in ((1, True), (2, False)):
        with pytest.raises(RequestError, match="Set weights to host or auto"):
            placed(FLUX_DEV, ranks, weights="shared", peers=peers)


def plan_says(monkeypatch, capsys, path, *arguments):
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", str(path), *arguments])
    code = main()
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("plan") / "flux.safetensors"
    write_checkpoint(str(found), TINY_FLUX, seed=1)
    return found


def test_plan_answers_for_cards_that_are_not_there(monkeypatch, capsys, path):
    code, said, errors = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", "24")
    assert code == 0 and not errors
    assert "ulysses 2 x ring 1" in said and "any GPUs: whole, 0." in said and "times are an H100's" in said
    kept = kept_free(TINY_FLUX, 2)
    whole = placed(TINY_FLUX, dtype=torch.bfloat16).device_bytes
    free = f"{(kept + whole) / 1e9 - 1e-3:.4f}"
    code, said, _ = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", free, "--card", "rtx4090")
    assert code == 0 and said.count("of 4 blocks stay") >= 2 and "GB of host memory are needed" in said
    assert "NVLink bridge" in said and said.count("PCIe 4 x8") == 2 and "predicted for RTX 4090" in said
    assert "with --linear fp8" in said and "times are an H100's" not in said
    code, said, _ = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", free, "--card", "RTX 3090")
    assert code == 0 and "--linear fp8" not in said
    code, said, _ = plan_says(monkeypatch, capsys, path, "--gpus", "0", "--free", "24", "--linear", "fp8")
    assert code == 0 and "one GPU: whole" in said and said.splitlines()[-4].split()[0] == "any"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "0,1", "--free", f"{kept_free(TINY_FLUX, 2) / 1e9 + 1e-3:.4f}"), "Free memory of the GPUs"),
        (("--gpus", "nonsense"), "or add --free 24 for GPUs of 24 GB that need not exist"),
        (("--gpus", "auto", "--free", "24"), "Give --gpus a number for each GPU, as 0,1"),
        (("--gpus", "0,0", "--free", "24"), "Give --gpus a number for each GPU, as 0,1"),
        (("--gpus", "cpu:2", "--card", "H100"), "Name a model file, and GPUs: --card H100"),
        (("--gpus", "0", "--free", "24", "--linear", "fp8", "--card", "A100"), "Leave out --linear fp8"),
    ],
)
def test_what_plan_refuses(monkeypatch, capsys, path, arguments, words):
    code, _, errors = plan_says(monkeypatch, capsys, path, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors


@pytest.mark.parametrize("free", ["nan", "inf", "-3", "0", "much"])
def test_sizes_that_are_none(monkeypatch, capsys, path, free):
    with pytest.raises(SystemExit) as ended:
        plan_says(monkeypatch, capsys, path, "--gpus", "0,1", f"--free={free}")
    assert ended.value.code == 2 and f"give a number of GB above 0, as 24: got {free}" in capsys.readouterr().err


def test_cards_that_are_none(monkeypatch, capsys, path):
    with pytest.raises(SystemExit):
        plan_says(monkeypatch, capsys, path, "--card", "RTX 1")
    assert "choose the card that is most like yours, of H100, H200" in capsys.readouterr().err


def test_room_without_a_file(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", "--gpus", "0,1", "--free", "24"])
    assert main() == 2 and "Name a model file: --free 24" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", "--gpus", "cpu:2", "--linear", "fp8"])
    assert main() == 2 and "Name a model file: --linear fp8" in capsys.readouterr().err


def test_products_in_fp8_are_not_asked_of_gpus_that_are_not_meant(monkeypatch, capsys, path):
    """CPU ranks have them, and imagined GPUs are not those that are there."""
    monkeypatch.setattr(plan, "list_gpus", lambda: pytest.fail("NVML was asked"))
    for devices in (("--gpus", "cpu:2"), ("--gpus", "0,1", "--free", "24")):
        code, said, errors = plan_says(monkeypatch, capsys, path, *devices, "--linear", "fp8")
        assert code == 0 and not errors and "weights: 0." in said


@pytest.mark.parametrize(
    ("sizes", "names", "words"),
    [
        ((96, 80), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "of 80.0 GB of each GPU"),
        ((96, 80), ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 3090"), "predicted for RTX 3090"),
        ((96, 80), ("NVIDIA H100 80GB HBM3", "Tesla T4"), "no times: choose the card"),
        ((96, None), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "of 96.0 GB of each GPU"),
        ((None, None), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "NVML reports no size"),
    ],
)
def test_plan_answers_for_the_gpus_that_are_there(monkeypatch, capsys, path, sizes, names, words):
    """As if all memory of the smallest were free; with the times of the slowest, if it is known."""
    totals = {0: 4 * GB, **{number: size and size * GB for number, size in zip((2, 3), sizes, strict=True)}}
    monkeypatch.setattr(plan, "local_devices", lambda _: Devices(ranks=2, gpus=(2, 3)))
    monkeypatch.setattr(inputs, "supports_bfloat16", lambda _: True)
    states = [SimpleNamespace(index=index, total=size) for index, size in totals.items()]
    monkeypatch.setattr(plan, "gpu_states", lambda: states)
    gpus = [
        SimpleNamespace(index=index, name=name, compute_capability=(9, 0) if "H" in name else (8, 0))
        for index, name in zip((2, 3), names, strict=True)
    ]
    monkeypatch.setattr(plan, "list_gpus", lambda: gpus)
    code, said, errors = plan_says(monkeypatch, capsys, path)
    assert code == 0 and not errors and words in said and "weights: 0." in said
    code, _, errors = plan_says(monkeypatch, capsys, path, "--linear", "fp8")
    assert (code == 2 and "Leave out --linear fp8" in errors) == any("H" not in name for name in names)


def test_whether_tokens_come_by_the_same_links():
    def beside(ranks, weights, **room):
        return placed(TINY_FLUX, ranks, weights=weights, **room).beside_tokens

    assert beside(2, "shared") and beside(2, "host", peers=False)
    assert not beside(2, "host", peers=True) and not beside(1, "host", peers=False) and not beside(2, "whole")


def plan_of_flux2(host=None, free=24 * GB, tensors=None):
    """What `fits` says of FLUX.2 on two GPUs."""
    file = plan.File(tensors or header(FLUX2_DEV), FLUX2_DEV, spec_with("auto"))
    return "\n".join(plan.fits(file, (Layout(ulysses=2, ring=1),), free, host, linear="exact", card=None, hint=True))


@pytest.mark.parametrize("host", [None, 32 * GB, 64 * GB])
def test_plan_says_how_much_host_memory_it_takes(host):
    said = plan_of_flux2(host)
    assert "49.1 GB of host memory are needed" in said and "48 shared" in said  # with fp8
    assert ("needed, 32.0 GB are available" in said) == (host == 32 * GB) and "64.0" not in said


def test_plan_of_a_packed_file_whose_products_in_fp8_would_take_more():
    """And no word of them where they would help little."""
    small = {name: TensorInfo(info.shape, torch.float8_e4m3fn) for name, info in header(FLUX2_DEV).items()}
    assert "--linear" not in plan_of_flux2(tensors=small)
    packed = {
        name: TensorInfo(info.shape, torch.uint8, packing="Q4_0") if len(info.shape) == 2 else info
        for name, info in small.items()
    }
    kept, need = kept_free(FLUX2_DEV, 2), place_file(packed, spec_with("host"), 2, peers=False).device_bytes
    assert "come from host memory" in plan_of_flux2(free=kept + need + GB // 9, tensors=packed)


def test_host_memory_that_does_not_suffice():
    found = placed(FLUX_DEV, weights="host")
    with pytest.raises(RequestError, match=r"^Free host memory, or .* take 17.\d GB of it, 16.0 GB are available"):
        check_host_room(found, Room(False, None, 16 * GB))
    check_host_room(found, Room(False, None, None))


def test_guided_models_leave_room_for_a_prompt_on_half_of_the_ranks():
    schnell = replace(FLUX_DEV, guidance=False)
    for config in (QWEN_IMAGE, schnell):  # as wide as FLUX_DEV
        assert [kept_free(config, n) for n in (1, 2, 3, 4)] == [kept_free(FLUX_DEV, n) for n in (1, 1, 3, 2)]
