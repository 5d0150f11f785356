"""The Triton kernels of the fp8 wire and of the ring's merge against their plain torch references."""

import pytest
import torch

from fastusp_backend.kernels import fp8, merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIM = 128
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rows(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, device="cuda", generator=generator)
    return (x * torch.randn(*shape[:-1], 1, device="cuda", generator=generator).exp()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("carrier", fp8.LARGEST)
def test_packed_bits_are_the_references(carrier, heads, size, dtype):
    x = (rows(2, 77, heads, DIM) * size).to(dtype)
    x[0, 5] = 0
    for source in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        kernel, reference = (torch.zeros(2, 77, fp8.pitch(heads, DIM), dtype=carrier, device="cuda") for _ in "ab")
        fp8.pack(source, kernel)
        fp8.pack_reference(source, reference)
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_head_that_is_not_finite_arrives_as_nan(bad, dtype):
    x = rows(1, 77, 3, DIM, dtype=dtype)
    x[0, 5, 1, 7] = x[0, 60, 2, 0] = bad
    packed, out = (
        torch.zeros(1, 1, 1, 77, fp8.pitch(3, DIM), dtype=torch.uint8, device="cuda"),
        torch.zeros_like(x)[None],
    )
    for pack, unpack in ((fp8.pack, fp8.unpack), (fp8.pack_reference, fp8.unpack_reference)):
        pack(x, packed[0, 0])
        unpack(packed, out, fp8.Destination(77, 0, 77, 0))
        expected = torch.zeros(77, 3, dtype=torch.bool, device="cuda")
        expected[5, 1] = expected[60, 2] = True
        assert torch.equal(out[0, 0].isnan().all(-1), expected) and torch.equal(out[0, 0].isnan().any(-1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "to, gathered, heads",
    [
        (fp8.Destination(20, 20, 60, 50, skipped=1), 210, 3),
        (fp8.Destination(20, 0, 20, 0, head_step=3, skipped=0), 70, 9),
        (fp8.Destination(0, 20, 60, 70), 270, 3),
    ],
)
@pytest.mark.parametrize("carrier", fp8.LARGEST)
def test_rows_are_unpacked_as_the_reference_does(carrier, to, gathered, heads, dtype):
    packed = torch.zeros(2 * 3 * 2, 70, fp8.pitch(3, DIM), dtype=carrier, device="cuda")
    fp8.pack_reference(rows(12, 70, 3, DIM), packed)
    packed = packed.unflatten(0, (2, 3, 2))
    kernel, reference = (torch.zeros(2, 2, gathered, heads, DIM, dtype=dtype, device="cuda") for _ in "ab")
    fp8.unpack(packed, kernel, to)
    fp8.unpack_reference(packed, reference, to)
    assert kernel.any() and torch.equal(kernel, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_equals_its_reference(dtype):
    out, lse = rows(2, 77, 3, DIM), rows(2, 3, 77, 1, seed=1)[..., 0].contiguous()
    part = rows(2, 3, 77, DIM, dtype=dtype, seed=2).transpose(1, 2)
    part_lse = rows(2, 3, 96, 1, seed=3)[:, :, :77, 0]
    expected, expected_lse = out.clone(), lse.clone()
    merge.merge(out, lse, part, part_lse)
    merge.merge_reference(expected, expected_lse, part, part_lse)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
