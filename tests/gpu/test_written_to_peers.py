"""Kernels that write to other ranks' memory themselves, all ranks played on one GPU: each token is where copies would
have brought it, to the bit. test_exchange.py has them between ranks."""

import pytest
import torch

from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout
from fastusp_backend.kernels.place import place
from fastusp_backend.kernels.scatter import scatter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = ((2, 12, 128, 1), (3, 2, 64, 2), (8, 3, 128, 1))
"""Ranks, heads of each, head dimension, batch."""


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device="cuda")


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("ranks, heads, dim, batch", SHAPES)
def test_attended_tokens_return_to_their_owners(ranks, heads, dim, batch, in_parts):
    shards = SequenceShards(Layout(ulysses=ranks, ring=1), 29, 701)
    text, local = shards.local_text, shards.local
    attended = [drawn(batch, shards.gathered, heads, dim) for _ in range(ranks)]
    came = [torch.zeros(batch, local, ranks, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(ranks)]
    for position, tokens in enumerate(attended):
        for rows in (slice(0, text), slice(text, local)) if in_parts else (slice(0, local),):
            scatter(tokens, addresses(came), position, text, shards.local_image, rows)
    for to, position in torch.cartesian_prod(torch.arange(ranks), torch.arange(ranks)).tolist():
        for rows, region in shards.regions(to):
            assert torch.equal(came[to][:, rows, position], attended[position][:, region])


@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("ranks, heads, dim, batch", SHAPES)
def test_projected_tokens_reach_the_ranks_of_their_heads(ranks, heads, dim, batch, image_only):
    shards = SequenceShards(Layout(ulysses=ranks, ring=1), 29, 701)
    first = shards.local_text if image_only else 0
    rows = shards.local - first
    shape = 3, batch, shards.gathered, heads, dim
    came = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(ranks)]
    expected = [tensor.clone() for tensor in came]
    scales = drawn(dim), drawn(dim), None
    angles = torch.rand(rows, dim // 2, device="cuda")
    for position in range(ranks):
        regions = shards.regions(position)
        projected = drawn(batch, rows, 3 * ranks * heads * dim)
        laid_out = projected, scales, (angles.cos(), angles.sin()), slice(0, 3), first
        outgoing = torch.zeros(3, ranks, batch, shards.local, heads, dim, device="cuda", dtype=torch.bfloat16)
        place(*laid_out, came[position], outgoing, position, regions, peers=addresses(came))
        assert not outgoing.any()
        place(*laid_out, expected[position], outgoing, position, regions)
        for to in {*range(ranks)} - {position}:
            for local_rows, region in regions[image_only:]:
                expected[to][:, :, region] = outgoing[:, to, :, local_rows]
    for got, right in zip(came, expected, strict=True):
        assert torch.equal(got, right)
