"""Segments of a stream whose tokens take modulations of several rows equal one row's, token by token."""

import pytest
import torch
from support import randn

from fastusp_backend.models.segments import Segments

pytestmark = pytest.mark.unit

ROWS = torch.tensor([0, 0, 1, 0, 1])


@pytest.mark.parametrize("name, streams, modulations", [("norm", 1, 2), ("add", 2, 1), ("add_norm", 2, 3)])
def test_rows(name, streams, modulations):
    plain = Segments(torch.device("cpu"), fused=False)
    by_row = plain.by_row(ROWS)
    x = [randn(2, 5, 8, seed=n) for n in range(streams)]
    two = [randn(2, 2, 8, seed=10 + n) for n in range(modulations)]
    got = getattr(by_row, name)(*x, *two)
    for token, row in enumerate(ROWS.tolist()):
        own = [m[:, row : row + 1] for m in two]
        expected = getattr(plain, name)(*(part[:, token : token + 1] for part in x), *own)
        pairs = zip(got, expected, strict=True) if name == "add_norm" else [(got, expected)]
        for mine, wanted in pairs:
            torch.testing.assert_close(mine[:, token : token + 1], wanted)
    one = [m[:, :1] for m in two]
    for mine, wanted in zip(getattr(by_row, name)(*x, *one), getattr(plain, name)(*x, *one), strict=True):
        assert torch.equal(mine, wanted)
