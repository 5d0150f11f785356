"""The Triton kernels of the fp8 wire, the ring's merge, fp8 and packed weights against their plain torch references."""

from itertools import product

import pytest
import torch
from formats import HALVES, random_blocks
from packed_layers import in_memory

from fastusp_backend.kernels import eight_bits, merge, unpack, widen
from fastusp_backend.kernels import gguf_blocks as kernel
from fastusp_backend.kernels import scaled_blocks as scaled_kernel
from fastusp_backend.kernels.unpack import Destination, Own
from fastusp_backend.weights import packings, scaled_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALED = [(kind, None) for kind in ("nvfp4", "mxfp8", "int8", "int8_rows")]


def rows(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, device="cuda", generator=generator)
    return (x * torch.randn(*shape[:-1], 1, device="cuda", generator=generator).exp()).to(dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
@pytest.mark.parametrize("hardware", [True, False])
def test_packed_bits_are_the_references(dim, carrier, heads, size, dtype, hardware, monkeypatch):
    monkeypatch.setattr(eight_bits, "has_e4m3", lambda device: hardware)
    x = (rows(2, 77, heads, dim) * size).to(dtype)
    x[0, 5] = 0
    for source in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        kernel, reference = (
            torch.zeros(2, 77, eight_bits.pitch(heads, dim), dtype=carrier, device="cuda") for _ in "ab"
        )
        eight_bits.pack(source, kernel)
        eight_bits.pack_reference(source, reference)
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_head_that_is_not_finite_arrives_as_nan(dim, bad, dtype):
    x = rows(1, 77, 3, dim, dtype=dtype)
    x[0, 5, 1, 7] = x[0, 60, 2, 0] = bad
    packed, out = (
        torch.zeros(1, 1, 1, 77, eight_bits.pitch(3, dim), dtype=torch.uint8, device="cuda"),
        torch.zeros_like(x)[None],
    )
    for packing, unpacking in (
        (eight_bits.pack, unpack.unpack),
        (eight_bits.pack_reference, unpack.unpack_reference),
    ):
        packing(x, packed[0, 0])
        unpacking(packed, out, Destination(77, 0, 77, 0))
        expected = torch.zeros(77, 3, dtype=torch.bool, device="cuda")
        expected[5, 1] = expected[60, 2] = True
        assert torch.equal(out[0, 0].isnan().all(-1), expected) and torch.equal(out[0, 0].isnan().any(-1), expected)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "to, gathered, heads",
    [
        (Destination(20, 20, 60, 50, skipped=1), 210, 3),
        (Destination(20, 0, 20, 0, head_step=3, skipped=0), 70, 9),
        (Destination(0, 20, 60, 70), 270, 3),
    ],
)
@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
@pytest.mark.parametrize("hardware", [True, False])
def test_rows_are_unpacked_as_the_reference_does(dim, carrier, to, gathered, heads, dtype, hardware, monkeypatch):
    monkeypatch.setattr(unpack, "has_e4m3", lambda device: hardware)
    packed = torch.zeros(2 * 3 * 2, 70, eight_bits.pitch(3, dim), dtype=carrier, device="cuda")
    eight_bits.pack_reference(rows(12, 70, 3, dim), packed)
    packed = packed.unflatten(0, (2, 3, 2))
    kernel, reference = (torch.zeros(2, 2, gathered, heads, dim, dtype=dtype, device="cuda") for _ in "ab")
    unpack.unpack(packed, kernel, to)
    unpack.unpack_reference(packed, reference, to)
    assert kernel.any() and torch.equal(kernel, reference)


@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
def test_own_rows_lie_between_the_others(carrier):
    packed = torch.zeros(3 * 2, 70, eight_bits.pitch(3, 128), dtype=carrier, device="cuda")
    eight_bits.pack_reference(rows(6, 70, 3, 128), packed)
    packed, own = packed.unflatten(0, (1, 3, 2)), Own(rows(2, 210, 3, 128, seed=4).bfloat16(), 40, 160)
    kernel, reference = (torch.zeros(1, 2, 70, 9, 128, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    for out, by in ((kernel, unpack.unpack), (reference, unpack.unpack_reference)):
        by(packed, out, Destination(20, 0, 20, 0, head_step=3, skipped=1), own)
    assert torch.equal(kernel, reference)
    assert torch.equal(kernel[0, :, :20, 3:6], own.values[:, 40:60]) and kernel[..., :3, :].any()
    assert torch.equal(kernel[0, :, 20:, 3:6], own.values[:, 160:])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_equals_its_reference(dim, dtype):
    out, lse = rows(2, 77, 3, dim), rows(2, 3, 77, 1, seed=1)[..., 0].contiguous()
    part = rows(2, 3, 77, dim, dtype=dtype, seed=2).transpose(1, 2)
    part_lse = rows(2, 3, 96, 1, seed=3)[:, :, :77, 0]
    expected, expected_lse = out.clone(), lse.clone()
    merge.merge(out, lse, part, part_lse)
    merge.merge_reference(expected, expected_lse, part, part_lse)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HALVES)
def test_blocks_are_unpacked_as_the_reference_does(name, dtype):
    values, size, *_ = packings.PACKINGS[name]
    data, added = torch.from_numpy(random_blocks(name, 77, 768, seed=1)), rows(77, 512, dtype=dtype)
    for within in (slice(None), slice(256 // values * size, None)):
        part = data[:, within]
        want, columns = packings.unpack(part, name, torch.float32).cuda(), part.shape[1] // size * values
        out = torch.empty(77, columns, dtype=dtype, device="cuda")
        kernel.unpack(data.cuda()[:, within], name, values, size, out)
        assert torch.equal(out, want.to(dtype))
        if columns == 512:
            kernel.unpack(data.cuda()[:, within], name, values, size, out, added)
            assert torch.equal(out, (want + added.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, group", [*SCALED, *product(("int8_convrot", "int4_convrot"), scaled_blocks.GROUPS)])
def test_scaled_blocks_are_unpacked_as_the_reference_does(kind, group, dtype):
    stored, _ = in_memory(kind, 77, 2048, seed=1, **({"group": group} if group else {}))
    values, size, *_ = packings.PACKINGS[stored.packing]
    data, added = stored.data.cuda(), rows(77, 1024, dtype=dtype)
    scale = None if stored.scale is None else stored.scale.cuda()
    for within in (slice(None), slice(1024 // values * size, None)):
        want = packings.unpack(stored.data[:, within], stored.packing, torch.float32, None, stored.scale).cuda()
        out = torch.empty(want.shape, dtype=dtype, device="cuda")
        scaled_kernel.unpack(data[:, within], stored.packing, values, scale, out)
        assert torch.equal(out, want.to(dtype)) and torch.equal(out.signbit(), want.signbit())
        if want.shape[1] == 1024:
            scaled_kernel.unpack(data[:, within], stored.packing, values, scale, out, added)
            assert torch.equal(out, (want + added.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, "all", "rows"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_widened_as_the_reference_does(stored, scale, dtype):
    every = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(7, 12).view(stored)
    scales = {None: None, "all": torch.tensor(0.0137), "rows": torch.linspace(1e-5, 3, 7)[:, None]}
    factor = None if scale is None else scales[scale].cuda()
    for data in (every, every[:, 256:-40], every[:, :1]):
        kernel, reference = (how(data, factor, dtype) for how in (widen.widen, widen.widen_reference))
        assert kernel.dtype == dtype and torch.equal(kernel.isnan(), reference.isnan())
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        numbers = ~reference.isnan()  # of which NaN it is the kinds of GPUs differ
        assert torch.equal(kernel.view(bits)[numbers], reference.view(bits)[numbers])
    assert widen.widen(every[0], None if scale == "rows" else factor, dtype).shape == every[0].shape
