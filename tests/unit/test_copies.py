"""Rows at equal distances, as copy engines take them."""

import pytest
import torch

from fastusp_backend.comm.copies import copy, rows

pytestmark = pytest.mark.unit

MOST = 1000
WHOLE = torch.arange(2 * 6 * 5 * 3 * 4).view(2, 6, 5, 3, 4)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (WHOLE, (1, 720, (720,))),
        (WHOLE[0, :, 2], (6, 12, (60,))),
        (WHOLE[:, :, 2], (12, 12, (60,))),
        (WHOLE[:, 1:4, 2], None),
        (WHOLE[:, :, :, 1], (60, 4, (12,))),
        (WHOLE[:1, 2:5, 1:2], (3, 12, (60,))),
        (WHOLE[:, 1:3], (2, 120, (360,))),
        (WHOLE[..., 2], (180, 1, (4,))),
        (WHOLE[0, 0, 0, 0, 1:2], (1, 1, (1,))),
    ],
)
def test_rows(view, expected):
    found = rows(view, most=MOST)
    assert found == expected or expected and expected[0] == 1 and found[:2] == expected[:2]
    if found:  # they are the tensor's values, in its order
        count, width, (pitch,) = found
        flat = WHOLE.flatten()[view.storage_offset() :]
        assert torch.equal(flat.as_strided((count, width), (pitch, 1)).flatten(), view.flatten())


def test_two_tensors_are_rows_of_what_lies_together_in_both():
    whole, target = WHOLE[0, :, 1:3], torch.empty(6, 2, 3, 4)
    assert rows(target, whole, most=MOST) == (6, 24, (24, 60))
    assert rows(WHOLE[0, :, 1], target.new_empty(6, 3, 4), most=MOST) == (6, 12, (60, 12))
    assert rows(WHOLE[0, :, 1], target[:, 0], most=MOST) == (6, 12, (60, 24))


def test_rows_that_lie_farther_apart_than_engines_take():
    assert rows(WHOLE[0, :, 2], most=60) == (6, 12, (60,)) and rows(WHOLE[0, :, 2], most=59) is None
    assert rows(WHOLE, most=59) == (1, 720, (720,)), "in one piece"


def test_the_host_copies_as_torch_does():
    target = torch.zeros_like(WHOLE)
    copy(target[:, 1:4, 2], WHOLE[:, 1:4, 2])
    assert torch.equal(target[:, 1:4, 2], WHOLE[:, 1:4, 2]) and target.count_nonzero() == 2 * 3 * 12
