"""The plain torch that CPU ranks run, and that GPU tests compare kernels with, against rules written out here."""

import pytest
import torch
from support import randn

from fastusp_backend.kernels import eight_bits, tokens
from fastusp_backend.kernels.place import place
from fastusp_backend.kernels.unpack import Destination, unpack
from fastusp_backend.models.layers import RMSNorm
from fastusp_backend.models.segments import Segments

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SMALL = 3e-4
"""Values of this size, squared, are less than the 1e-6 that the models' norms add: any other constant shows."""


@pytest.mark.parametrize("carrier", eight_bits.LARGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_head_that_is_not_finite_arrives_as_nan_whole(value, dtype, carrier):
    x = randn(1, 4, 3, 8, seed=0).to(dtype)
    x[0, 2, 1, 5] = value
    rows = torch.empty(1, 4, eight_bits.pitch(3, 8), dtype=carrier)
    eight_bits.pack(x, rows)
    out = torch.zeros_like(x)[None]
    unpack(rows[None, None], out, Destination(4, 0, 4, 0))
    lost = torch.zeros(x.shape, dtype=torch.bool)
    lost[0, 2, 1] = True
    assert out[0][lost].isnan().all() and out[0][~lost].isfinite().all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stream_in_float16_stays_finite(fp8, dtype):
    """Its largest values are kept to, and what is no number counts as nothing; other types pass through."""
    segments, infinite = Segments(CPU, fused=False, fp8=fp8), float("inf")
    x = torch.tensor([60000.0, -60000.0, 1.0, infinite], dtype=dtype)[None, None]
    y = torch.tensor([60000.0, -60000.0, 2.0, -infinite], dtype=dtype)[None, None]
    gate, shift, scale = (torch.full((1, 1, 4), value, dtype=dtype) for value in (1.0, 0.0, 0.0))
    wanted = torch.tensor([65504.0, -65504.0, 3.0, 0.0])[None, None] if dtype == torch.float16 else x + y
    for got in (segments.add(x, y, gate), segments.add_norm(x, y, gate, shift, scale)[0]):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_norms_add_a_millionth():
    """To the mean square or the variance, as all of these models do."""
    x, zero = SMALL * randn(2, 3, 1, 64, seed=0), torch.zeros(1, 1, 64)
    wide = x[:, :, 0].double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    centred = wide - wide.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(tokens.norm_reference(x[:, :, 0], zero, zero).double(), layer, rtol=1e-4, atol=1e-6)
    norm = RMSNorm(64)
    norm.weight = torch.nn.Parameter(torch.ones(64))
    torch.testing.assert_close(norm(x[:, :, 0]).double(), rms, rtol=1e-4, atol=1e-6)
    received, outgoing = torch.empty(3, 2, 3, 1, 64), torch.empty(3, 1, 2, 3, 1, 64)
    scales, rope = (torch.ones(64), torch.ones(64), None), (torch.ones(3, 32), torch.zeros(3, 32))
    regions = [(slice(0, 1), slice(0, 1)), (slice(1, 3), slice(1, 3))]
    place(x.expand(-1, -1, 3, -1).flatten(2), scales, rope, slice(0, 3), 0, received, outgoing, 0, regions)
    for tensor, wanted in zip(received, (rms, rms, wide), strict=True):
        torch.testing.assert_close(tensor[:, :, 0].double(), wanted, rtol=1e-4, atol=1e-6)
