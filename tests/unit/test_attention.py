"""Attention back ends against float64, and the merge of parts."""

from types import SimpleNamespace

import pytest
import torch
from support import randn, relative_difference

from fastusp_backend.attention import flash3, local, trial
from fastusp_backend.kernels.merge import merge

pytestmark = pytest.mark.unit

HEADS = 12, 128
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def qkv(queries: int, keys: int, *, heads: int = 3, d: int = 128, batch: int = 2):
    return tuple(randn(batch, n, heads, d, seed=i) for i, n in enumerate((queries, keys, keys)))


def reference(q, k, v, scale):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(1, 1), (7, 33), (65, 9), (130, 257)], ids=str)
@pytest.mark.parametrize("name", ["flash", "math", "auto"])
def test_back_ends(name, lengths, dtype):
    if dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's kernel for CPUs packs for AVX-512 where the processor has AMX, whatever it was told")
    q, k, v = (t.to(dtype) for t in qkv(*lengths))
    chosen, attend = local.choose(name, CPU, dtype, HEADS)
    assert chosen == ("flash" if name == "auto" else name)
    out, lse = attend(q, k, v, 0.07)
    expected, expected_lse = reference(q, k, v, 0.07)
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, lengths[0])
    assert relative_difference(out.double(), expected) < TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_views_are_taken(name):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(5, 12))
    _, attend = local.choose(name, CPU, torch.float32, HEADS)
    out, _ = attend(q, k[:, 2:9], v[:, 2:9], 0.1)
    assert relative_difference(out.double(), reference(q, k[:, 2:9], v[:, 2:9], 0.1)[0]) < 2e-6


@pytest.mark.parametrize("splits", [(17,), (1, 30), (5, 6, 28), (40,)], ids=str)
@pytest.mark.parametrize("name", ["flash", "math"])
def test_parts_merge_to_the_whole(name, splits):
    q, k, v = qkv(11, 41)
    k = k * 4  # uneven parts
    _, attend = local.choose(name, CPU, torch.float32, HEADS)
    parts = zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True)
    merged = None
    for part in (attend(q, *pair, 0.1) for pair in parts):
        if merged is None:
            merged = tuple(t.contiguous() for t in part)
        else:
            merge(*merged, *part)
    expected, expected_lse = reference(q, k, v, 0.1)
    assert relative_difference(merged[0].double(), expected) < 2e-6
    torch.testing.assert_close(merged[1].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_merge_works_in_float32_and_bears_extremes():
    part = torch.full((1, 1, 1, 2), 3.0).bfloat16()
    for lse, part_lse, expected in ((200.0, -200.0, 1.0), (-200.0, 200.0, 3.0), (500.0, 500.0, 2.0)):
        merged, total = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), lse)
        merge(merged, total, part, torch.full((1, 1, 1), part_lse))
        assert merged.unique().tolist() == [expected]
        assert float(total) == pytest.approx(max(lse, part_lse), abs=1)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_what_the_device_lacks_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=f"^choose .* flash, math: '{name}' does not exist for float32 on cpu ranks"):
        local.choose(name, CPU, torch.float32, HEADS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_gpus_get_what_they_have(monkeypatch, capability, dtype):
    """torch's flash and cuDNN kernels begin with Ampere and take no float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash3, "installed", lambda: False)
    device = torch.device("cuda", 0)
    half, ampere = dtype != torch.float32, capability >= (8, 0)
    expected = "efficient" if not half or not ampere else "flash" if capability < (9, 0) else "cudnn"
    assert local.choose("auto", device, dtype, HEADS)[0] == expected
    for name in ("cudnn", "flash", "efficient", "math"):
        if name in ("efficient", "math") or half and ampere:
            assert local.choose(name, device, dtype, HEADS)[0] == name
        else:
            with pytest.raises(
                ValueError, match=f"^choose .* one of efficient, math: '{name}' does not exist .* on cuda ranks"
            ):
                local.choose(name, device, dtype, HEADS)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("problem", ["", "in a CUDA graph its error is nan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flash_attention_3_is_for_hopper_with_its_package(monkeypatch, capability, installed, dtype, problem):
    monkeypatch.setattr(trial, "problem", lambda *_, **__: problem)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash3, "installed", lambda: installed)
    device = torch.device("cuda", 0)
    there = capability == (9, 0) and dtype == torch.bfloat16
    if there and installed and not problem:
        assert local.choose("flash3", device, dtype, HEADS) == ("flash3", flash3.flash3_split)
        assert local.choose("auto", device, dtype, HEADS) == ("cudnn and flash3", local.hopper_split)
        return
    with pytest.raises(ValueError, match="'flash3' does not exist") as refused:
        local.choose("flash3", device, dtype, HEADS)
    assert str(refused.value).startswith("install the package fa3-fwd" if there else "choose attention = 'auto'")
    assert str(refused.value).endswith(": it needs an H100 or H200, in bf16") != there
    assert "flash3" not in local.choose("auto", device, dtype, HEADS)[0]


@pytest.mark.parametrize(
    ("shape", "leads"),  # as measured on an H100: docs of attention/flash3.py
    [
        ((4608, 12, 128), True),
        ((4608, 3, 128), True),
        ((2304, 24, 128), True),
        ((2304, 12, 128), False),
        ((1152, 12, 128), False),
        ((4250, 12, 64), True),
        ((4250, 6, 64), False),
        ((2125, 19, 64), True),
        ((2125, 12, 64), False),
        ((1125, 19, 64), True),
        ((1125, 24, 64), False),
        ((16896, 24, 96), False),
    ],
)
def test_the_faster_kernel_for_a_shape_is_taken(monkeypatch, shape, leads):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    q = torch.empty(1, *shape, device="meta")
    called = []
    monkeypatch.setattr(flash3, "flash3", lambda *_: called.append("flash3"))
    monkeypatch.setattr(local, "cudnn", lambda *_: called.append("cudnn"))
    local.hopper(q, q, q, 1.0)
    assert called == ["flash3" if leads else "cudnn"]


def test_of_part_of_the_queries_the_keys_decide(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    k, called = torch.empty(1, 4608, 12, 128, device="meta"), []
    monkeypatch.setattr(flash3, "flash3", lambda *_: called.append("flash3"))
    local.hopper(k[:, :2048], k, k, 1.0)
    assert called == ["flash3"]


def test_a_package_that_does_not_load_is_told_and_left_alone(monkeypatch, tmp_path, caplog):
    (tmp_path / "fa3_fwd_interface.py").write_text("raise ImportError('undefined symbol: of another torch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for function in (flash3._package, flash3.installed):
        function.cache_clear()
    try:
        assert not flash3.installed() and not flash3.installed()
        assert caplog.text.count("does not load") == 1 and "of another torch" in caplog.text
    finally:
        for function in (flash3._package, flash3.installed):
            function.cache_clear()
