"""The Triton kernel that fills the exchange's buffers against its plain torch reference."""

import pytest
import torch

from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout
from fastusp_backend.kernels.eight_bits import pitch
from fastusp_backend.kernels.place import place, place_reference
from fastusp_backend.kernels.unpack import Destination, unpack_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, HEADS, DIM = 2, 4, 128
KINDS = {
    "rotated": (128, True, True),
    "of 64 values": (64, True, True),
    "normed": (64, True, False),
    "as is": (64, False, False),
}
"""Head dim, whether q and k are normed, and whether they are rotated."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("which", [slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 3)])
@pytest.mark.parametrize("text, image", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("ulysses, position", [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_kernel_equals_reference(ulysses, position, text, image, which, dtype, bound, kind):
    dim, normed, rotated = KINDS[kind]
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "generator": generator}
    shards = SequenceShards(Layout(ulysses=ulysses, ring=1), 37, 101)
    rows = (shards.local_text if text else 0) + (shards.local_image if image else 0)
    tensors = which.stop - which.start
    wide = torch.randn(BATCH, rows, tensors * HEADS * dim + 64, **like).to(dtype)
    projected = wide[..., : tensors * HEADS * dim]  # rows further apart than they are long, as in a fused projection
    scales = (torch.randn(dim, **like).to(dtype), torch.randn(dim, **like).to(dtype), None)[which]
    if not normed:
        scales = (None,) * tensors
    rope = (torch.randn(rows, dim // 2, **like), torch.randn(rows, dim // 2, **like)) if rotated else None
    results = []
    for function in (place, place_reference):
        received = torch.zeros(3, BATCH, shards.gathered, HEADS // ulysses, dim, device="cuda", dtype=dtype)
        outgoing = torch.zeros(3, ulysses, BATCH, shards.local, HEADS // ulysses, dim, device="cuda", dtype=dtype)
        first_row = 0 if text else shards.local_text
        function(projected, scales, rope, which, first_row, received, outgoing, position, shards.regions(position))
        results.append(torch.cat([received.flatten(), outgoing.flatten()]).float())
    kernel, reference = results
    assert (kernel != 0).any()
    torch.testing.assert_close(kernel, reference, rtol=bound, atol=bound * reference.abs().max().item())


def test_what_leaves_may_be_packed():
    generator = torch.Generator("cuda").manual_seed(0)
    shards = SequenceShards(Layout(ulysses=2, ring=1), 37, 101)
    projected = torch.randn(BATCH, shards.local, 3 * HEADS * DIM, device="cuda", generator=generator).bfloat16()
    scales = torch.ones(DIM, device="cuda"), torch.ones(DIM, device="cuda"), None
    rope = tuple(torch.randn(2, shards.local, DIM // 2, device="cuda", generator=generator))
    results = []
    for function in (place, place_reference):
        received = torch.zeros(3, BATCH, shards.gathered, HEADS // 2, DIM, device="cuda", dtype=torch.bfloat16)
        outgoing = torch.zeros(3, 2, BATCH, shards.local, pitch(HEADS // 2, DIM), device="cuda", dtype=torch.uint8)
        function(projected, scales, rope, slice(0, 3), 0, received, outgoing, 1, shards.regions(1))
        values = torch.zeros(3, BATCH, 2 * shards.local, HEADS // 2, DIM, device="cuda")
        unpack_reference(outgoing, values, Destination(shards.local, shards.local, 0, 0))
        results.append((outgoing, values))
    (bits, kernel), (expected_bits, reference) = results
    assert torch.equal(bits[2], expected_bits[2]) and bits[2].any()  # v is not computed with
    torch.testing.assert_close(kernel, reference, rtol=0.13, atol=0.02)  # a rounding may fall the other way
