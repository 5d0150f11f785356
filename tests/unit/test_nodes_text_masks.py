"""Which attention masks do nothing but hide the end of a text."""

import pytest
import torch

pytestmark = pytest.mark.unit

LOWEST, NEVER = torch.finfo(torch.float32).min, -torch.inf


@pytest.mark.parametrize(
    "rows, lengths",
    [
        ([[1, 1, 0]], [2]),
        ([[1, 1, 1], [1, 0, 0]], [3, 1]),
        ([[0.0, LOWEST, NEVER]], [1]),
        ([[1, 0, 1]], None),  # the tokens behind a hole have positions of their own
        ([[0, 1, 1]], None),
        ([[0, 0, 0]], None),
        ([[1, 1, 0], [1, 0, 1]], None),
        ([[1, 2, 0]], None),
        ([[0.0, -0.5, -0.5]], None),
        ([[True, True, False]], None),
        ([[[1, 1, 0]]], None),
    ],
    ids=str,
)
def test_how_many_tokens_are_left(node_module, rows, lengths):
    assert node_module("text_masks").hidden_end(torch.tensor(rows)) == lengths


@pytest.mark.parametrize(
    "rows, nothing",
    [([[1, 1]], True), ([[1, 0]], False), ([[0.0, 0.0]], True), ([[0.0, -0.5]], False), ([[False, True]], False)],
    ids=str,
)
def test_what_has_no_effect(node_module, rows, nothing):
    assert node_module("text_masks").masks_nothing(torch.tensor(rows)) is nothing
