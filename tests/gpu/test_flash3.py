"""FlashAttention-3 against the reference, on Hopper with its package."""

import pytest
import torch

from fastusp_backend.attention import flash3, local

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability() != flash3.CAPABILITY
        or not flash3.installed(),
        reason="needs an H100 or H200, and the package fa3-fwd",
    ),
]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [(1, 9), (300, 300), (77, 1031), (4608, 4608)], ids=str)
def test_out_and_lse(lengths, batch, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, 12, dim, device="cuda", generator=generator).bfloat16()
        for n in (lengths[0],) + lengths[1:] * 2
    )
    k, v = k[:, : lengths[1] - 3], v[:, : lengths[1] - 3]  # as where a rank's last keys are padding
    out, lse = flash3.flash3(q, k, v, 0.1)
    expected, expected_lse = local.math(q.float(), k.float(), v.float(), 0.1)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 5e-3
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-3)


def test_it_is_captured_in_a_graph():
    q = torch.randn(1, 4608, 12, 128, device="cuda").bfloat16()
    name, attend = local.choose("auto", q.device, q.dtype, q.shape[2:])
    assert name == "cudnn and flash3"
    with torch.inference_mode():
        expected = attend(q, q, q, 0.1)[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = attend(q, q, q, 0.1)
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("images", "queries", "keys", "heads"),
    [
        (1, 4608, 4608, 12),
        (1, 4352, 4352, 12),
        (1, 2048, 4608, 12),
        (1, 77, 4608, 3),
        (1, 4300, 4605, 12),
        (2, 4608, 4608, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "e4m3"])
def test_parts_of_the_keys_are_joined(monkeypatch, eight, images, queries, keys, heads):
    """As exact as in one call, in a graph as well; the same bits each time. As on 132 multiprocessors."""
    assert flash3.can_split(torch.device("cuda", torch.cuda.current_device()), (heads, 128), eight=eight)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(images, n, heads, 128, device="cuda", generator=generator).bfloat16() for n in (queries, keys, keys)
    )
    found, split = [], flash3.split
    monkeypatch.setattr(flash3, "_units", lambda device: 132)
    monkeypatch.setattr(flash3, "split", lambda *given: found.append(split(*given)) or found[-1])
    in_parts, whole = (flash3.flash3_fp8_split, flash3.flash3_fp8) if eight else (flash3.flash3_split, flash3.flash3)
    expected, _ = local.math(q.float(), k.float(), v.float(), 0.09)
    with torch.inference_mode():
        out, lse = in_parts(q, k, v, 0.09)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again, _ = in_parts(q, k, v, 0.09)
        graph.replay()
    assert found[0][1] > 1 and lse is None and torch.equal(out, again)
    bound = ((whole(q, k, v, 0.09)[0] - expected).norm() / expected.norm()).item()
    assert (out - expected).norm() / expected.norm() < 1.05 * bound
