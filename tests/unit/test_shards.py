"""Over all ranks every token is held once, for any lengths and layout, and one slice leaves all padding out."""

import pytest
import torch
from support import randn

from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout
from fastusp_backend.models.patchify import patchify, unpatchify

pytestmark = pytest.mark.unit

LAYOUTS = [(u, r) for u in range(1, 9) for r in range(1, 9) if u * r <= 8]
LENGTHS = (1, 2, 3, 5, 7, 8, 16, 24, 301, 512)


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_every_token_is_valid_exactly_once(ulysses, ring):
    layout = Layout(ulysses=ulysses, ring=ring)
    for text in LENGTHS:
        for image in LENGTHS:
            shards = SequenceShards(layout, text, image)
            text_ids, image_ids = torch.arange(1, text + 1), -torch.arange(1, image + 1)
            held = [
                torch.cat([shards.take_text(text_ids, rank, dim=0), shards.take_image(image_ids, rank, dim=0)])
                for rank in range(layout.ranks)
            ]
            assert {len(part) for part in held} == {shards.local} == {shards.local_text + shards.local_image}
            valid = []
            for position in range(ring):
                gathered = torch.empty(shards.gathered, dtype=torch.long)
                for i, part in enumerate(held[position * ulysses : (position + 1) * ulysses]):
                    for rows, region in shards.regions(i):
                        gathered[region] = part[rows]
                valid.append(gathered[shards.valid(position)])
            everything = sorted(torch.cat(valid).tolist())
            assert everything == sorted(torch.cat([text_ids, image_ids]).tolist())


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_no_more_is_padded_than_equal_parts_need(ulysses, ring):
    """Nothing where the ranks divide a stream: each token of padding is computed in vain in every layer."""
    ranks = ulysses * ring
    for length in LENGTHS:
        shards = SequenceShards(Layout(ulysses=ulysses, ring=ring), length, length)
        parts = {shards.local_text, shards.local_image}
        assert len(parts) == 1 and 0 <= parts.pop() * ranks - length < ranks


@pytest.mark.parametrize("ulysses, ring", [(1, 1), (2, 1), (1, 3), (2, 2), (1, 8)])
@pytest.mark.parametrize("image", [1, 3, 8, 13, 64])
def test_image_parts_join_to_the_whole(ulysses, ring, image):
    layout = Layout(ulysses=ulysses, ring=ring)
    shards = SequenceShards(layout, 5, image)
    x = randn(2, image, 3, seed=0)
    parts = torch.stack([shards.take_image(x, rank, dim=1) for rank in range(layout.ranks)])
    assert parts.shape == (layout.ranks, 2, shards.local_image, 3)
    assert torch.equal(shards.join_image(parts), x)
    assert parts.count_nonzero() == x.count_nonzero()


def test_tokens_can_be_taken_along_any_dimension():
    shards = SequenceShards(Layout(ulysses=2, ring=1), 5, 7)
    x = randn(3, 7, 2, seed=1)
    for rank in range(2):
        taken = shards.take_image(x, rank, dim=1)
        assert torch.equal(shards.take_image(x.transpose(1, 2), rank, dim=2), taken.transpose(1, 2))


@pytest.mark.parametrize("size", [(2, 2), (16, 12), (1, 1), (1, 4), (7, 6), (6, 7), (33, 17)])
def test_patches(size):
    height, width = size
    x = randn(2, 3, *size, seed=3)
    grid = (height + 1) // 2, (width + 1) // 2
    tokens = patchify(x, 2)
    assert tokens.shape == (2, grid[0] * grid[1], 12)
    assert torch.equal(unpatchify(tokens, grid, 2)[..., :height, :width], x)
    for row in range(grid[0]):
        for column in range(grid[1]):
            # Odd sizes wrap round: a row too many is the first one.
            patch = x[:, :, [2 * row, (2 * row + 1) % height]][..., [2 * column, (2 * column + 1) % width]]
            assert torch.equal(tokens[:, row * grid[1] + column], patch.flatten(1))


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_what_is_held_of_an_image_stream_is_taken_without_padding(ulysses, ring):
    layout = Layout(ulysses=ulysses, ring=ring)
    for image in LENGTHS:
        for length in (1, image // 2, image):  # of the stream's beginning
            x, shards = torch.arange(1, length + 1)[None], SequenceShards(layout, 1, image)
            parts = [shards.unpadded_image(x, rank, dim=1) for rank in range(layout.ranks)]
            assert torch.equal(torch.cat(parts, dim=1), x)
            for rank, part in enumerate(parts):
                taken = shards.take_image(x, rank, dim=1)
                assert torch.equal(taken[:, : part.shape[1]], part) and not taken[:, part.shape[1] :].any()


def test_patches_of_one_pixel():
    x = randn(2, 3, 5, 4, seed=3)
    tokens = patchify(x, 1)
    assert torch.equal(tokens, x.flatten(2).mT)
    assert torch.equal(unpatchify(tokens, (5, 4), 1), x)
