"""Captions, their scenes, latents without a VAE, and the check in pixels."""

import pytest
import torch

from fastusp_backend import shapes
from fastusp_backend.errors import RequestError
from fastusp_backend.shapes import captions, scenes
from fastusp_backend.shapes.captions import Caption

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


def drawn(caption: Caption, height: int = 256, width: int = 256, seed: int = 0) -> torch.Tensor:
    made = scenes.vary(scenes.middle([caption]), torch.Generator().manual_seed(seed))
    return scenes.draw(made, height, width)[0]


def test_every_caption_is_read_as_it_is_written():
    every = scenes.all_captions()
    assert len(every) == 3 * 6 * 3 * 5 * 3 + (54 * 45) * 4 * 3
    assert all(Caption.read(str(caption)) == caption for caption in every[::7])
    assert 0.08 < sum(map(scenes.held_back, every)) / len(every) < 0.12


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("A red circle left of a blue square", "a red circle left of a blue square on white"),
        ("an orange triangle, on a gray background.", "a orange triangle on grey"),
        ("a large green square at the top on black", "a large green square at the top on black"),
    ],
)
def test_what_people_write(text, means):
    assert str(Caption.read(text)) == means


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a pink dog", "Use the demo model's words: a, small, .*, background. It does not know 'pink', 'dog'"),
        ("", 'Write one or two shapes, as "a large red circle'),
        ("a red circle a blue square", 'Write one or two shapes, as "a large red circle'),
        ("a red circle at the left of a blue square", 'Write one or two shapes, as "a large red circle'),
    ],
)
def test_what_is_no_caption(text, said):
    with pytest.raises(RequestError, match=said):
        Caption.read(text)


def test_embeddings_are_rows_of_a_hadamard_matrix():
    """Known from its definition by Kronecker's product; all words of all parts are orthogonal."""
    hadamard = torch.ones(1, 1)
    for _ in range(7):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    context, pooled = captions.embed(torch.arange(128)[:, None].expand(-1, captions.TOKENS))
    assert torch.equal(context[1:, 0, :128], hadamard[1:]) and not context[0].any()
    assert context.shape == (128, captions.TOKENS, captions.CONTEXT) and pooled.shape == (128, captions.POOLED)
    assert len(captions.WORDS) < captions._STRIDE


@pytest.mark.parametrize("size", [(256, 256), (256, 384), (512, 512)])
def test_pictures_meet_their_captions_and_no_others(size):
    chosen = scenes.all_captions()[5::1201]
    for caption, other in zip(chosen, chosen[1:], strict=False):
        picture = shapes.decode(shapes.encode(drawn(caption, *size)[None]))[0]
        assert shapes.unmet(caption, picture) == [] and shapes.unmet(other, picture)


@pytest.mark.parametrize(
    ("wanted", "seen", "said"),
    [
        ("a red circle", "a red square", "the red circle is a square"),
        ("a large red circle", "a red circle", "the red circle is of middle size"),
        ("a red circle", "a small red circle", "the red circle is small"),
        ("a red circle at the left", "a red circle", "the red circle is elsewhere"),
        ("a red circle", "a blue circle", "the red circle is not there"),
        ("a red circle on grey", "a red circle on black", "the background is not grey"),
    ],
)
def test_what_is_not_as_the_caption_says(wanted, seen, said):
    assert shapes.unmet(Caption.read(wanted), drawn(Caption.read(seen))) == [said]


def test_two_shapes_that_have_changed_places():
    swapped = drawn(Caption.read("a blue square left of a red circle"))
    failures = shapes.unmet(Caption.read("a red circle left of a blue square"), swapped)
    assert failures[:2] == ["the red circle is not there", "the blue square is not there"]


def test_latents_are_flux_shaped_and_invertible():
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) / 4 + 0.375
    latents = shapes.encode(pictures)
    assert latents.shape == (2, 16, 8, 12)
    assert torch.allclose(shapes.encode(shapes.decode(latents)), latents, atol=1e-5)
    means = torch.nn.functional.avg_pool2d(2 * pictures - 1, 8)
    assert torch.allclose(
        torch.einsum("bkyx,kc->bcyx", latents, torch.tensor(shapes.preview_factors())), means, atol=1e-5
    )
    even = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(shapes.decode(shapes.encode(even)), even, atol=1e-6)
    assert shapes.psnr(even, even) == float("inf") and shapes.psnr(even, even + 0.1) == pytest.approx(20, abs=1e-3)
