"""What a step computes and sends, by a model's sizes."""

import pytest

from fastusp_backend.config import Layout
from fastusp_backend.models.cost import step_cost
from fastusp_backend.models.synthetic import FLUX_DEV, QWEN_IMAGE, SD35_LARGE, SD35_MEDIUM, Z_IMAGE

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


def test_operations_are_those_of_the_papers_formulas():
    """FLUX.1: per token 24 C^2 in each stream of a double block, of which either has its own, and in a single block."""
    tokens, c = 4096 + 512, 3072
    products = 2 * 12 * c * c * tokens * (19 + 38)
    attention = 4 * tokens**2 * c * 57
    cost = step_cost(FLUX_DEV, Layout(ulysses=2, ring=1), size=(1024, 1024), text=512)
    assert cost.flops == pytest.approx(products + attention, rel=1e-6) and cost.attention == attention
    assert cost.streams == 2 * 19 + 38 and (cost.messages, cost.turns) == (57, 0)
    assert cost.sent_bytes == 57 * 2 * 4 * (tokens / 2) * c / 2
    assert cost.parameters == 2 * 12 * c * c * 19 + 12 * c * c * 38
    assert cost.text_parameters == 12 * c * c * 19 and cost.text_tokens == 512 / 2
    around = step_cost(FLUX_DEV, Layout(ulysses=1, ring=4), size=(1024, 1024), text=512)
    assert around.sent_bytes == 57 * 2 * 2 * (tokens / 4) * c * 3 and around.messages == around.turns == 57 * 3
    assert step_cost(QWEN_IMAGE, Layout(ulysses=1, ring=1), size=(1024, 1024), text=35).sent_bytes == 0


def test_blocks_of_the_image_alone_cost_its_tokens():
    """Z-Image's first two; both streams are filled up to a multiple of 32."""
    cost = step_cost(Z_IMAGE, Layout(ulysses=2, ring=1), size=(1024, 1008), text=35)
    image, tokens, width = 4032, 4096, 3840
    weights = 4 * width**2 + 3 * width * 10240
    assert cost.parameters == 32 * weights
    seen = ((2, image), (30, tokens))
    assert cost.flops == pytest.approx(sum(n * (2 * weights * seen + 4 * seen**2 * width) for n, seen in seen))
    assert cost.sent_bytes == pytest.approx(sum(n * seen for n, seen in seen) / 2 * width * 2 * 2)


@pytest.mark.parametrize("config, second", [(SD35_LARGE, 0), (SD35_MEDIUM, 13)])
def test_operations_of_the_image_alone(config, second):
    """Second attentions, 4 C^2 a token, and the last block's text, of which only 3 C^2 are left."""
    image, text, c, blocks = 4096, 154, config.hidden, config.blocks
    products = 2 * c * c * (12 * (blocks * image + (blocks - 1) * text) + 3 * text + 4 * second * image)
    cost = step_cost(config, Layout(ulysses=1, ring=1), size=(1024, 1024), text=text)
    assert cost.flops - cost.attention == pytest.approx(products, rel=1e-9)
    assert cost.attention == 4 * c * (blocks * (image + text) ** 2 + second * image**2)
