"""When exchanges are awaited: with overlap as late as possible, without it where they start."""

import pytest
import torch

from fastusp_backend.attention import ALL, JointAttention
from fastusp_backend.attention.local import math
from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.transport import Links
from fastusp_backend.comm.ulysses import LocalExchange
from fastusp_backend.config import Layout

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class Recorder(LocalExchange):
    """Notes what is asked of an exchange, in order."""

    def __init__(self, received):
        super().__init__(received)
        self.calls = []

    def send(self, which, *, text=True, image=True):
        self.calls.append("send")

    def wait(self):
        self.calls.append("wait")

    def give_back(self, attended):
        self.calls.append("give back")
        super().give_back(attended)

    def take_back(self):
        self.calls.append("take back")
        return super().take_back()


@pytest.mark.parametrize(
    "overlap, expected",
    [
        (True, ["send", "send", "attend", "wait", "give back", "collect", "take back"]),
        (False, ["send", "wait", "send", "wait", "attend", "wait", "give back", "take back", "collect"]),
    ],
)
def test_order(overlap, expected):
    shards = SequenceShards(Layout(ulysses=1, ring=1), 2, 3)
    exchange = Recorder(torch.empty(3, 1, 5, 2, 8))
    links = Links(exchange, None, None)
    joint = JointAttention(single_rank_mesh(CPU), math, shards, links, overlap=overlap, pipelined=True)
    scales = torch.ones(8), torch.ones(8), None
    for rows, stream in ((2, {"image": False}), (3, {"text": False})):
        rope = torch.ones(rows, 4), torch.zeros(rows, 4)
        joint.project(torch.randn(1, rows, 3 * 2 * 8), scales, rope, ALL, **stream)
    exchange.calls.append("attend")
    joint.attend()
    exchange.calls.append("collect")
    assert joint.collect().shape == (1, 5, 16)
    assert exchange.calls == expected
