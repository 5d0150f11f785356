"""The wire's quantisers: their error, their idempotence, and where unpacked rows go."""

import pytest
import torch

from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.wire import Wire, unpack_gathered, unpack_returned
from fastusp_backend.config import Layout
from fastusp_backend.kernels import eight_bits
from fastusp_backend.kernels.unpack import Destination, unpack

pytestmark = pytest.mark.unit

HEADS, DIM = 3, 8
WHOLE = Destination(5, 0, 5, 0)


def packed(x: torch.Tensor, carrier: torch.dtype = torch.uint8) -> torch.Tensor:
    out = torch.empty(*x.shape[:2], eight_bits.pitch(*x.shape[2:]), dtype=carrier)
    eight_bits.pack(x, out)
    return out


def unpacked(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(like, torch.nan)[None]
    unpack(rows[None, None], out, WHOLE)
    return out[0]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_within_half_an_ulp(size, dtype):
    x = (torch.randn(2, 5, HEADS, DIM, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    back = unpacked(packed(x), x).double()
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / 448
    ulp = torch.maximum(2.0 ** torch.floor(torch.log2((x / scale).abs())), torch.tensor(2.0**-6)) / 8
    rounding = 0 if dtype == torch.float32 else 2**-8  # of the result to bfloat16
    assert ((back - x).abs() <= (ulp / 2 * scale) * (1 + 1e-6) + rounding * x.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_within_half_a_step(dtype):
    x = torch.randn(2, 5, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = unpacked(packed(x, torch.int8), x).double()
    step = x.double().abs().amax(-1, keepdim=True) / 127
    rounding = 0 if dtype == torch.float32 else 2**-8
    assert ((back - x.double()).abs() <= step / 2 * (1 + 1e-6) + rounding * x.double().abs()).all()


@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
def test_largest_values_zeros_and_signs_are_kept(carrier):
    x = torch.zeros(1, 5, HEADS, DIM)
    x[0, 1, 1, 2], x[0, 3, 2, 0] = -7.3, 0.1
    back = unpacked(packed(x, carrier), x)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
def test_values_whose_scale_has_no_inverse_are_zeros(carrier):
    x = torch.zeros(1, 5, HEADS, DIM)
    x[0, 1, 1, 2] = 1e-38
    assert torch.equal(unpacked(packed(x, carrier), x), torch.zeros_like(x))


@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
def test_packing_again_changes_nothing(carrier):
    x = torch.randn(2, 5, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    filled = HEADS * (DIM + 4)  # the rest is padding
    once = packed(x, carrier)
    assert torch.equal(packed(unpacked(once, x), carrier)[..., :filled], once[..., :filled])


def test_rows_are_padded_to_sixteen_bytes():
    assert [eight_bits.pitch(h, 128) for h in (1, 2, 3, 12)] == [144, 272, 400, 1584]
    assert Wire(3, 128, torch.bfloat16, torch.int8).row == (400,) and Wire(3, 128, torch.bfloat16).row == (3, 128)


@pytest.mark.parametrize("text, image", [(True, True), (True, False), (False, True)])
def test_gathered_rows_go_where_attention_reads_them(text, image):
    shards = SequenceShards(Layout(ulysses=2, ring=1), 3, 5)  # 2 + 3 local tokens
    first, last = 0 if text else shards.local_text, shards.local if image else shards.local_text
    x = torch.randn(1, 2, 1, shards.local, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    rows = packed(x.flatten(0, 2)).unflatten(0, (1, 2, 1))[:, :, :, first:last].contiguous()
    received = torch.full((1, 1, shards.gathered, HEADS, DIM), torch.nan)
    unpack_gathered(rows, received, shards, 1, text=text, image=image)
    expected = torch.full_like(received, torch.nan)
    for local, region in shards.regions(0, text=text, image=image):
        expected[:, :, region] = x[:, 0, :, local]
    torch.testing.assert_close(received, expected, rtol=0.07, atol=0.02, equal_nan=True)


def test_returned_rows_go_to_their_heads_and_the_own_ones_stay_exact():
    shards = SequenceShards(Layout(ulysses=2, ring=1), 3, 5)
    generator = torch.Generator().manual_seed(3)
    theirs = torch.randn(2, 1, shards.local, HEADS, DIM, generator=generator)
    own = torch.randn(1, shards.gathered, HEADS, DIM, generator=generator)
    rows = packed(theirs.flatten(0, 1)).unflatten(0, (2, 1))
    out = unpack_returned(rows, own, shards, 1).unflatten(2, (2, HEADS, DIM))
    torch.testing.assert_close(out[:, :, 0], theirs[0], rtol=0.07, atol=0.02)
    for local, region in shards.regions(1):
        assert torch.equal(out[:, local, 1], own[:, region])
