"""When exchanges are awaited: with overlap as late as possible, without it where they start."""

import dataclasses

import pytest
import torch
from support import OneRank, inputs, randn

from fastusp_backend.attention import ALL, ONLY_K, ONLY_Q, ONLY_V, JointAttention
from fastusp_backend.attention.local import math
from fastusp_backend.comm.links import Links, LocalUlysses
from fastusp_backend.comm.mesh import single_rank_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.config import Layout, Settings
from fastusp_backend.engine import evaluation
from fastusp_backend.models.synthetic import TINY_FLUX
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class Recorder(LocalUlysses):
    """Notes what is asked of Ulysses' exchanges, in order."""

    def __init__(self, received):
        super().__init__(received)
        self.calls = []

    def send(self, which, *, text=True, image=True):
        self.calls.append("send")

    def wait(self):
        self.calls.append("wait")

    def give_back(self, attended, *, text_first=False, own_later=False):
        self.calls.append("give back" + ", text first" * text_first + ", own later" * own_later)
        self.given_back = attended.clone()
        super().give_back(attended)

    def keep(self):
        self.calls.append("keep")

    def take_text(self):
        self.calls.append("take text")
        return super().take_back()

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
    ulysses = Recorder(torch.empty(3, 1, 5, 2, 8))
    links = Links(ulysses, None, None)
    joint = JointAttention(single_rank_mesh(CPU), math, shards, links, overlap=overlap, pipelined=True)
    scales = torch.ones(8), torch.ones(8), None
    for rows, stream in ((2, {"image": False}), (3, {"text": False})):
        rope = torch.ones(rows, 4), torch.zeros(rows, 4)
        joint.project(torch.randn(1, rows, 3 * 2 * 8), scales, rope, ALL, **stream)
    ulysses.calls.append("attend")
    joint.attend()
    ulysses.calls.append("collect")
    assert joint.collect().shape == (1, 5, 16)
    assert ulysses.calls == expected
    ulysses.calls.clear()
    joint.attend(text_first=True)
    assert joint.collect_text().shape == (1, 2, 16) and joint.collect_image().shape == (1, 3, 16)
    taken = ["take text", "take back"] if overlap else ["take back"]
    assert ulysses.calls == ["wait", "give back, text first", *taken]


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("image_only", [False, True])
def test_own_image_is_attended_while_the_others_tokens_travel(position, image_only):
    """Of 2 x 2 tokens of text, the first one padding, and 2 x 3 of the image, the last one padding."""
    mesh, shards = single_rank_mesh(CPU), SequenceShards(Layout(ulysses=2, ring=1), 3, 5)
    mesh = dataclasses.replace(mesh, layout=shards.layout)
    given, called = randn(3, 2, shards.gathered, 2, 8, seed=0), []

    def attend(q, k, v, scale):
        called.append((q, k))
        return math(q, k, v, scale)

    links = []
    for own_last in (False, True):
        ulysses = Recorder(given.clone())
        ulysses.position, ulysses.own_last = position, own_last
        joint = JointAttention(mesh, attend, shards, Links(ulysses, None, None), overlap=True, pipelined=True)
        joint.attend(text_first=True, image_only=image_only)
        links.append((ulysses, joint.collect()))
    (_, wanted), (ulysses, got) = links
    assert ulysses.calls == ["wait", "give back, text first, own later", "keep", "take back"]
    torch.testing.assert_close(got, wanted)
    own = slice(4 + 3 * position, 7 + 3 * position)
    others = [*range(own.start), *range(own.stop, shards.gathered)]
    torch.testing.assert_close(ulysses.given_back.flatten(2)[:, others], wanted[:, others])
    assert [q.shape[1] for q, _ in called] == [10, 7, 3]
    assert all(k.shape[1] == (5 if image_only else 8) for _, k in called)
    torch.testing.assert_close(called[2][0], given[0][:, own])


class Ring:
    """Three blocks of keys and values, (2, B, N, h, D) each. Notes how it was asked for them."""

    def __init__(self, blocks, keys_first=False):
        self.blocks, self.keys_first, self.asked = blocks, keys_first, []

    def start(self, own):
        self.asked.append("start")

    def rotate(self, own, *, pipelined):
        self.asked.append(pipelined)
        yield from enumerate(self.blocks)


def over_ring(blocks, q, *, attend=math, pipelined=True) -> tuple[torch.Tensor, Ring]:
    """The attended tokens of one rank of three, (B, N, h D), and the ring."""
    batch, tokens, heads, dim = q.shape
    mesh, shards = single_rank_mesh(CPU), SequenceShards(Layout(ulysses=1, ring=3), 3, 3 * tokens - 3)
    ulysses, ring = LocalUlysses(torch.empty(3, batch, tokens, heads, dim, dtype=q.dtype)), Ring(blocks)
    mesh = dataclasses.replace(mesh, layout=Layout(ulysses=1, ring=3))
    joint = JointAttention(mesh, attend, shards, Links(ulysses, ring, None), overlap=True, pipelined=pipelined)
    ulysses.received[0] = q
    joint.attend()
    return joint.collect(), ring


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_a_ring_are_merged_in_float32(dtype):
    """And rounded once."""
    q, *blocks = (randn(*shape, seed=n).to(dtype) for n, shape in enumerate([(2, 9, 2, 8)] + 3 * [(2, 2, 9, 2, 8)]))
    got, _ = over_ring(blocks, q)
    parts = [math(q, k, v, 8**-0.5) for k, v in blocks]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    wanted = sum(weight.double() * out.double() for weight, (out, _) in zip(weights, parts, strict=True))
    assert got.dtype == dtype
    # Half a unit in the last place, and what float32 adds to that.
    spacing = torch.finfo(dtype).eps * 2 ** torch.floor(torch.log2(wanted.abs()))
    assert ((got.double() - wanted.flatten(2)).abs() <= spacing.flatten(2) / 2 + 1e-6).all()


@pytest.mark.parametrize("pipelined", [True, False])
def test_the_ring_is_asked_as_was_wanted(pipelined):
    _, ring = over_ring(
        [randn(2, 1, 4, 2, 8, seed=n) for n in range(3)], randn(1, 4, 2, 8, seed=3), pipelined=pipelined
    )
    assert ring.asked == [pipelined]


@pytest.mark.parametrize(
    "ulysses, overlap, pipelined, early",
    [(1, True, True, 1), (2, True, True, 0), (1, False, True, 0), (1, True, False, 0)],
)
def test_keys_and_values_leave_as_soon_as_they_are_complete(ulysses, overlap, pipelined, early):
    """Of text and image, in any order, layer after layer; where Ulysses brings others', they are not yet."""
    mesh, shards = single_rank_mesh(CPU), SequenceShards(Layout(ulysses=1, ring=2), 4, 6)
    mesh = dataclasses.replace(mesh, layout=Layout(ulysses=ulysses, ring=2))
    ring = Ring(randn(2, 2, 1, 5, 2, 8, seed=0))
    links = Links(LocalUlysses(randn(3, 1, 5, 2, 8, seed=1)), ring, None)
    joint = JointAttention(mesh, math, shards, links, overlap=overlap, pipelined=pipelined)

    def project(which, tokens, **streams):
        count = which.stop - which.start
        joint.project(randn(1, tokens, 16 * count, seed=2), (None,) * count, None, which, **streams)

    for _ in range(2):
        ring.asked.clear()
        for which in (ONLY_V, ONLY_K):
            project(which, 3, text=False)
        project(slice(0, 3), 2, image=False)
        assert ring.asked == early * ["start"]
        project(ONLY_Q, 3, text=False)
        joint.attend()
        assert ring.asked == early * ["start"] + [pipelined]
    ring.asked.clear()
    project(slice(0, 3), 3, text=False)
    joint.attend(image_only=True)
    assert ring.asked == [pipelined], "the text's were not projected"


@pytest.mark.parametrize(
    "ulysses, ring, overlap, parts",
    [
        (True, None, True, (ONLY_V, ONLY_K, ONLY_Q)),
        (True, True, True, (ONLY_V, ONLY_K, ONLY_Q)),
        (False, True, True, (slice(1, 3), ONLY_Q)),
        (False, True, False, (ALL,)),  # nothing of the ring travels before attention
        (False, False, True, (ALL,)),
        (False, None, True, (ALL,)),
    ],
)
def test_what_travels_long_is_projected_first(ulysses, ring, overlap, parts):
    """ulysses, ring: whether each wants it, None where there is no ring."""
    layout = Layout(ulysses=2 if ulysses else 1, ring=1 if ring is None else 2)
    mesh = dataclasses.replace(single_rank_mesh(CPU), layout=layout)
    local = LocalUlysses(torch.zeros(3, 1, 10, 2, 8))
    local.in_turn = ulysses
    links = Links(local, None if ring is None else Ring([], keys_first=ring), None)
    joint = JointAttention(mesh, math, SequenceShards(layout, 8, 12), links, overlap=overlap, pipelined=True)
    assert joint.parts == parts


def test_the_texts_queries_are_zeros_where_the_image_attends_alone():
    """Of nothing, or of a layer before: what is no number among them would spoil the scale of a head in 8 bits."""
    mesh, shards, seen = single_rank_mesh(CPU), SequenceShards(Layout(ulysses=1, ring=1), 2, 3), []

    def attend(q, k, v, scale):
        seen.append((q, k))
        return math(q, k, v, scale)

    ulysses = LocalUlysses(torch.full((3, 1, 5, 2, 8), torch.nan))
    joint = JointAttention(mesh, attend, shards, Links(ulysses, None, None), overlap=True, pipelined=True)
    joint.project(randn(1, 3, 48, seed=0), (None,) * 3, None, text=False)
    joint.attend(image_only=True)
    ((q, k),) = seen
    assert q.shape[1] == 5 and k.shape[1] == 3 and not q[:, :2].any() and q.isfinite().all() and k.isfinite().all()
    assert joint.collect_image().isfinite().all()


@pytest.mark.parametrize("overlap, pipelined", [(True, False), (False, True)])
def test_the_settings_say_when(monkeypatch, overlap, pipelined):
    made = []

    class Noted(JointAttention):
        def __init__(self, *args, **options):
            made.append(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(evaluation, "JointAttention", Noted)
    model = OneRank(TINY_FLUX.build(), Settings(overlap=overlap, ring_pipeline=pipelined))
    given = inputs(TINY_FLUX, text=2, size=(2, 2))
    model(given.x, given.timestep, Prompt(given.context, given.y, given.guidance))
    assert [(how["overlap"], how["pipelined"]) for how in made] == [(overlap, pipelined)]
