"""Which blocks stay and which travel, by the room that there is."""

from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.__main__ import main
from fastusp_backend.cli import inputs, plan
from fastusp_backend.config import FileState, ModelSpec
from fastusp_backend.devices import Devices
from fastusp_backend.engine.room import kept_free
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import storage_plans
from fastusp_backend.models.ownership import Ownership
from fastusp_backend.models.placement import PAGE, place_file, stream_count
from fastusp_backend.models.synthetic import FLUX2_DEV, FLUX_DEV, QWEN_IMAGE, TINY_FLUX, write_checkpoint
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]
GB = 10**9


def header(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = config.build()
    return {model.file_key(name): TensorInfo(tuple(p.shape), dtype) for name, p in model.named_parameters()}


def placed(config, ranks=2, *, dtype=torch.bfloat16, weights="auto", **room):
    spec = ModelSpec(path="x", file=FileState(0, 0, 0, 0), storage=None, compute="bfloat16", weights=weights)
    return place_file(header(config, dtype), spec, ranks, **room)


def test_what_fits_stays():
    found = placed(FLUX_DEV, available=24 * GB)
    assert not found.slabs and found.source is None and found.streamed_bytes == 0
    assert str(found) == "whole, 20.6 GB a device"


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
    with pytest.raises(RequestError, match="with all blocks travelling the weights still take .* of which 3.0 GB may"):
        placed(FLUX2_DEV, available=3 * GB)
    for ranks, peers in ((1, True), (2, False)):
        with pytest.raises(RequestError, match="Set weights to host or auto"):
            placed(FLUX_DEV, ranks, weights="shared", peers=peers)


def plan_says(monkeypatch, capsys, path, *arguments):
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", str(path), *arguments])
    code = main()
    return code, *capsys.readouterr()


def test_plan_answers_for_cards_that_are_not_there(monkeypatch, capsys, tmp_path):
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), TINY_FLUX, seed=1)
    code, said, errors = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", "24")
    assert code == 0 and not errors
    assert "ulysses 2 x ring 1" in said and said.count("whole, 0.") == 2
    kept = kept_free(TINY_FLUX, 2)
    whole = placed(TINY_FLUX, dtype=torch.bfloat16).device_bytes
    code, said, _ = plan_says(
        monkeypatch, capsys, path, "--gpus", "0,1", "--free", f"{(kept + whole) / 1e9 - 1e-3:.4f}"
    )
    assert code == 0 and "of 4 blocks stay" in said and "GB of host memory" in said
    assert "ms a step over NVLink" in said and "989 TFLOP/s (--tflops)" in said
    code, said, _ = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", f"{kept / 1e9 + 1e-3:.4f}")
    assert code == 0 and said.count("Use a smaller file or weight_dtype, or more GPUs") == 2
    code, _, errors = plan_says(monkeypatch, capsys, path, "--gpus", "0,1", "--free", "24", "--tflops", "0")
    assert code == 2 and "--tflops 0 is for a model file, GPUs, and a rate above 0" in errors
    code, _, errors = plan_says(monkeypatch, capsys, path, "--gpus", "cpu:2", "--tflops", "165")
    assert code == 2 and "--tflops 165 is for a model file, GPUs" in errors
    code, _, errors = plan_says(monkeypatch, capsys, path, "--gpus", "auto", "--free", "24")
    assert code == 2 and "list the GPUs' numbers, as 0,1" in errors


@pytest.mark.parametrize(("total", "words"), [(80, "whole, 0."), (None, "NVML reports no memory size for GPU 3")])
def test_plan_answers_for_the_gpus_that_are_there(monkeypatch, capsys, tmp_path, total, words):
    """As if all memory of the smallest were free."""
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), TINY_FLUX, seed=1)
    sizes = {0: 4 * GB, 2: 96 * GB, 3: total and total * GB}
    states = [SimpleNamespace(index=index, total=size) for index, size in sizes.items()]
    monkeypatch.setattr(plan, "local_devices", lambda _: Devices(ranks=2, gpus=(2, 3)))
    monkeypatch.setattr(inputs, "supports_bfloat16", lambda _: True)
    monkeypatch.setattr(plan, "gpu_states", lambda: states)
    code, said, errors = plan_says(monkeypatch, capsys, path)
    assert code == 0 and not errors and words in said and "ms a step over NVLink" in said
    assert f"of {total or 96}.0 GB of each GPU" in said
