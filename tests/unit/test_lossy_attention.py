"""Attention in 8 bits by packages that are played (tests/attention_packages.py), against exact attention: layouts,
scales, the log-sum-exp and the merge of a ring's parts; where it is refused, with what to do first."""

import functools
import sys
from types import SimpleNamespace

import attention_packages
import pytest
import torch
from attention_packages import PACKAGES, clear
from support import randn, relative_difference

from fastusp_backend.attention import flash3, local, lossy, sage, trial
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import EIGHT_BIT_ATTENTION, Layout, Settings
from fastusp_backend.engine import Denoiser
from fastusp_backend.errors import RequestError
from fastusp_backend.kernels.merge import merge
from fastusp_backend.kernels.smooth import quantise_heads, smooth

pytestmark = pytest.mark.unit

SCALE = 128**-0.5
CUDA = torch.device("cuda", 0)
HEADS = 3, 128
BOUNDS = {"flash3-fp8": 0.12, "flash-attn 3": 0.12, "sage": 4.5e-2, "sage 1": 2.5e-2}
"""Relative to exact attention in float32, on keys with a large mean."""


@pytest.fixture
def install(monkeypatch):
    """install(*names): see attention_packages."""
    yield functools.partial(attention_packages.install, monkeypatch)
    clear()


def back_end(name: str, *, ring: bool = True):
    return lossy.BACKENDS["sage" if name.startswith("sage") else "flash3-fp8"][0][ring]


def qkv(queries: int, keys: int, *, mean: float = 4.0):
    """Keys whose channels have means of their own, as those of trained models."""
    q, k, v = (randn(2, n, 3, 128, seed=i) for i, n in enumerate((queries, keys, keys)))
    return tuple(x.bfloat16() for x in (q, k + mean * randn(3, 128, seed=9), v))


def exact(q, k, v):
    return local.math(q.float(), k.float(), v.float(), SCALE)


@pytest.mark.parametrize("lengths", [(1, 64), (70, 192), (130, 320)], ids=str)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("name", PACKAGES)
def test_out_and_lse(install, name, ring, lengths):
    install(name)
    q, k, v = qkv(*lengths)
    kept = k.clone()
    if name == "sage 1" and ring:
        pytest.skip("version 1 has no log-sum-exp")
    out, lse = back_end(name, ring=ring)(q, k, v, SCALE)
    expected, expected_lse = exact(q, k, v)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape and torch.equal(k, kept)
    assert relative_difference(out.float(), expected) < BOUNDS[name]
    if name.startswith("sage") and not ring:
        assert lse is None
    else:
        assert lse.dtype == torch.float32 and lse.shape == (2, 3, lengths[0])
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=6e-2 if name != "sage" else 3e-2)


@pytest.mark.parametrize("name", ["flash3-fp8", "sage"])
def test_the_mean_of_keys_costs_nothing(install, name):
    """Where queries and keys without it are what 8 bits hold exactly, so is the log-sum-exp: that of the mean is added
    in float32, though it is hundreds of times what rounds in the type of q."""
    install(name)
    signs = torch.randint(0, 2, (2, 64, 1, 128), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    k = torch.cat([signs, -signs], 1) + 32.0 * (torch.arange(128) % 2)
    q = (torch.randint(0, 2, (2, 40, 1, 128), generator=torch.Generator().manual_seed(1)) * 2.0 - 1).bfloat16()
    v = randn(2, 128, 1, 128, seed=2).bfloat16()
    _, lse = back_end(name)(q, k.bfloat16(), v, SCALE)
    _, expected = exact(q, k, v)
    assert expected.abs().max() > 20
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("splits", [(96,), (17,), (40, 41, 150)], ids=str)
@pytest.mark.parametrize("name", ["flash3-fp8", "flash-attn 3", "sage"])
def test_parts_of_a_ring_merge_to_the_whole(install, name, splits):
    """Each with a mean of its own, which one part's keys alone have, and other parts weigh as much."""
    install(name)
    q, k, v = qkv(50, 192, mean=0)
    q = (q + 0.5).contiguous()
    k[:, : splits[0]] += 0.75
    merged = None
    for pair in zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True):
        out, lse = back_end(name)(q, *pair, SCALE)
        if merged is None:
            merged = out.float(), lse
        else:
            merge(*merged, out, lse)
    expected, expected_lse = exact(q, k, v)
    assert relative_difference(merged[0], expected) < BOUNDS[name]
    torch.testing.assert_close(merged[1], expected_lse, rtol=0, atol=8e-2)


@pytest.mark.parametrize("name", ["flash3-fp8", "sage", "sage 1"])
def test_views_are_taken(install, name):
    """As where a rank's first and last keys are padding, in buffers that hold q, k and v."""
    install(name)
    buffer = torch.stack([*qkv(70, 70)])
    q, k, v = buffer[0], buffer[1, :, 3:67], buffer[2, :, 3:67]
    out, _ = back_end(name, ring=name == "sage")(q, k, v, SCALE)
    assert relative_difference(out.float(), exact(q, k, v)[0]) < BOUNDS[name]


def test_smoothing_is_what_8_bits_need(install):
    """A mean of keys, in other channels for each head, would cost most of e4m3's codes."""
    install("flash3-fp8")
    q, k, v = qkv(100, 500, mean=40)
    kept = relative_difference(flash3.flash3_fp8(q, k, v, SCALE)[0].float(), exact(q, k, v)[0])
    scale = k.abs().amax((1, 3), keepdim=True).float() / 448
    coarse = (k.float() / scale).to(torch.float8_e4m3fn).float() * scale
    assert kept < 0.09 < 0.3 < relative_difference(exact(q, coarse, v)[0], exact(q, k, v)[0])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_mean_of_values_costs_nothing(install, parts):
    """Tensor cores lose what is small beside a sum: with their mean the values of the last of many keys."""
    install("flash3-fp8")
    q, k, v = randn(1, 2, 1, 64, seed=0), randn(1, 16896, 1, 64, seed=1), randn(1, 16896, 1, 64, seed=2)
    q, k, v = (x.bfloat16() for x in (q, k, v + 3 * randn(64, seed=3)))
    expected, _ = local.math(q.float(), k.float(), v.float(), 0.125)
    merged = None
    for rows in torch.arange(k.shape[1]).tensor_split(parts):
        out, lse = flash3.flash3_fp8(q, k[:, rows], v[:, rows], 0.125)
        if merged is None:
            merged = out.float(), lse
        else:
            merge(*merged, out, lse)
    heads, one = quantise_heads(q, k, v), torch.ones(1, 1)
    scale = v.abs().amax((1, 3)).float() / 448
    plain, _ = attention_packages.flash_attn_func(
        heads.q,
        heads.k,
        (v / scale).to(torch.float8_e4m3fn),
        softmax_scale=0.125,
        q_descale=heads.scales[0],
        k_descale=heads.scales[1],
        v_descale=scale * one,
        return_attn_probs=True,
    )
    assert relative_difference(merged[0], expected) < 4e-3 < 0.2 < relative_difference(plain.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_less_their_mean(dtype):
    q, k = randn(2, 7, 3, 64, seed=1).to(dtype), (randn(2, 33, 3, 64, seed=2) + 5).to(dtype)
    smoothed, shift = smooth(q, k)
    mean = k.double().mean(1, keepdim=True)
    assert smoothed.dtype == dtype and smoothed.is_contiguous()
    torch.testing.assert_close(
        smoothed.double(), k.double() - mean, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    torch.testing.assert_close(shift.double(), (q.double() * mean).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-4)


def test_heads_have_one_scale_each():
    q, k, v = (x.float() for x in qkv(9, 65))
    v[:, :, 0] += 5
    q[:, :, 1] *= 100
    v[:, :, 2] = 0
    k[1, 5, 0, 7] = torch.nan
    heads = quantise_heads(q, k, v)
    assert heads.scales.shape == (3, 2, 3) and heads.scales[1].isnan().tolist() == [[False] * 3, [True, False, False]]
    torch.testing.assert_close(heads.mean, v.mean(1))
    wanted_of = q, k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    for codes, scale, wanted in zip(heads[:3], heads.scales, wanted_of, strict=True):
        assert codes.dtype == torch.float8_e4m3fn and codes.shape == wanted.shape and codes.is_contiguous()
        good = wanted.isfinite().all(1, keepdim=True).all(-1, keepdim=True)
        got = torch.where(good, codes.float() * scale[:, None, :, None], 0)
        wanted = torch.where(good, wanted, 0)
        assert (got - wanted).norm() / wanted.norm() < 3e-2
        # The largest value of a head is met exactly.
        torch.testing.assert_close(got.abs().amax((1, 3)), wanted.abs().amax((1, 3)), rtol=1e-6, atol=0)


# ---- where it is refused


def on_gpus(monkeypatch, capability=(9, 0), failure: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(trial, "problem", lambda *_, **__: failure)


@pytest.mark.parametrize("name", EIGHT_BIT_ATTENTION)
def test_by_name_alone(install, monkeypatch, name):
    install("flash3-fp8", "sage")
    on_gpus(monkeypatch)
    assert {*lossy.BACKENDS} == {*EIGHT_BIT_ATTENTION} == {*lossy.installed()}
    whole, of_parts = lossy.BACKENDS[name][0]
    whole = flash3.flash3_fp8_split if name == "flash3-fp8" else whole
    for ring, function in ((False, whole), (True, of_parts)):
        assert local.choose(name, CUDA, torch.bfloat16, HEADS, ring=ring) == (name, function)
    assert local.choose("auto", CUDA, torch.bfloat16, HEADS)[0] == "cudnn and flash3"
    install()
    assert lossy.installed() == []


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "installed", "failure", "said"),
    [
        ("sage", (7, 5), torch.float16, ["sage"], "", "set attention = auto .* capability 8.0 .* capability 7.5$"),
        ("sage", (9, 0), torch.float32, ["sage"], "", "set attention = auto .* bf16 and fp16; this is float32 on cuda"),
        ("sage", (9, 0), torch.bfloat16, [], "", "install the package sageattention with the Python of ComfyUI, or "),
        ("sage", (9, 0), torch.bfloat16, ["sage"], "no SM90", "install a sageattention for this GPU .*: no SM90$"),
        ("sage", (9, 0), torch.bfloat16, ["sage 1"], "", "install version 2 .*, set ring = 1 .* no log-sum-exp"),
        ("flash3-fp8", (8, 9), torch.bfloat16, ["flash3-fp8"], "", "set attention = auto .* H100 and H200, in bf16;"),
        ("flash3-fp8", (9, 0), torch.float16, ["flash3-fp8"], "", "set attention = auto .*; this is float16 on cuda"),
        ("flash3-fp8", (9, 0), torch.bfloat16, ["sage"], "", "install the package fa3-fwd, for this torch"),
        ("flash3-fp8", (9, 0), torch.bfloat16, ["flash3-fp8"], "no FP8", "install a fa3-fwd that has fp8, .*: no FP8$"),
    ],
)  # fmt: skip
def test_refused_with_what_to_do_first(install, monkeypatch, name, capability, dtype, installed, failure, said):
    install(*installed)
    on_gpus(monkeypatch, capability, failure)
    with pytest.raises(ValueError, match=f"^{said}"):
        local.choose(name, CUDA, dtype, HEADS, ring=True)


@pytest.mark.parametrize("name", EIGHT_BIT_ATTENTION)
def test_cpu_ranks_have_neither(install, name):
    install("flash3-fp8", "sage")
    with pytest.raises(ValueError, match=f"^set attention = auto .*'{name}' is for .*; this is float32 on cpu ranks$"):
        local.choose(name, torch.device("cpu"), torch.float32, HEADS)


def test_an_older_package_is_none(install, monkeypatch, caplog):
    """It would fail in the middle of a run, with `auto` as well."""
    install("flash-attn 3")
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_func", lambda q, k, v: None)
    assert flash3.present() and not flash3.installed() and "without return_attn_probs" in caplog.text


@pytest.mark.parametrize("function", [lambda q, k, v: None, None], ids=["older", "none"])
def test_an_older_package_hides_no_newer_one(install, monkeypatch, function):
    install("flash3-fp8", "flash-attn 3")
    assert flash3._package() is sys.modules["fa3_fwd_interface"]
    clear()
    if function is None:
        monkeypatch.delattr(sys.modules["fa3_fwd_interface"], "flash_attn_func")
    else:
        monkeypatch.setattr(sys.modules["fa3_fwd_interface"], "flash_attn_func", function)
    assert flash3.installed() and flash3._package() is sys.modules["flash_attn_interface"]


@pytest.mark.parametrize("lengths", [(70, 192), (130, 1000)], ids=str)
def test_the_kernel_in_triton(install, lengths):
    install("sage")
    q, k, v = qkv(*lengths)
    out, lse = sage.sage_triton(q, k, v, SCALE)
    expected, expected_lse = exact(q, k, v)
    assert out.dtype == torch.bfloat16 and relative_difference(out.float(), expected) < BOUNDS["sage 1"]
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=3e-2)


def test_version_1_of_sage_needs_no_ring_and_whole_blocks(install, monkeypatch):
    install("sage 1")
    assert trial.problem(sage.sage_whole, torch.device("cpu"), torch.bfloat16, HEADS, lse=False) == ""
    on_gpus(monkeypatch)
    assert local.choose("sage", CUDA, torch.bfloat16, HEADS) == ("sage", sage.sage_whole)
    q, k, v = qkv(64, 65)
    q[:], k[:] = 0, 0  # all keys weigh the same, and so do the 63 that are not there
    assert relative_difference(sage.sage_whole(q, k, v, SCALE)[0].float() * 128 / 65, exact(q, k, v)[0]) < 0.02

    def check(text: int, image: int, attention: str = "sage", second_attentions: int = 0, ulysses: int = 2) -> None:
        layout = Layout(ulysses=ulysses, ring=1)
        config = SimpleNamespace(image_blocks=0, second_attentions=second_attentions)
        of = SimpleNamespace(_settings=Settings(attention=attention), _model=SimpleNamespace(config=config))
        of._mesh = SimpleNamespace(layout=layout)
        Denoiser._check_keys(of, SequenceShards(layout, text, image))

    check(512, 4096)
    check(13, 4096, attention="auto")
    check(32, 4096 - 32)
    for given in ({"text": 13, "image": 4096}, {"text": 32, "image": 4096 - 32, "second_attentions": 1}):
        with pytest.raises(RequestError, match="^install version 2 of SageAttention, or choose another"):
            check(**given)
    install("sage")
    check(13, 4096)
