"""One rank of test_exchange.py, started by torchrun: joint attention over memory that ranks share, against one rank's.

With fewer GPUs than ranks, ranks share one (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES). Where NCCL sends between
machines, each pair of ranks is one to NCCL, which takes sockets of the loopback interface then.
"""

import itertools
import os
import sys

import torch
import torch.distributed as dist

from fastusp_backend.attention import ALL, ONLY_K, ONLY_Q, ONLY_V, JointAttention
from fastusp_backend.attention.local import choose
from fastusp_backend.comm import messages, peers
from fastusp_backend.comm.mesh import make_mesh, single_rank_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.transport import Transport
from fastusp_backend.config import Layout

HEADS = 8
DTYPE = torch.bfloat16
SHAPES = ((1, 64, 256, 128), (1, 7, 333, 64), (2, 301, 64, 128), (1, 64, 256, 64), (1, 64, 256, 128))
"""batch, text tokens, image tokens, head dimension: the arena grows, and serves smaller shapes again."""
BOUNDS = {None: 1e-2, torch.uint8: 6e-2, torch.int8: 3e-2}
"""Relative difference by how the wire is packed."""
NETWORK = {"NCCL_SOCKET_IFNAME": "=lo", "NCCL_SOCKET_FAMILY": "AF_INET", "NCCL_IB_DISABLE": "1"}


def layer(joint: JointAttention, gather, text, image, scales, rope) -> torch.Tensor:
    """A double block's calls with the image's own attention, then a single block's on its result, then the final
    gather: all kinds of messages alternate as in the models. -> the image rows of all ranks (P, B, Li, H D)."""
    local_text = text.shape[1]
    text_rope, image_rope = tuple(r[:local_text] for r in rope), tuple(r[local_text:] for r in rope)
    c = text.shape[-1] // 3
    for which in (ONLY_V, ONLY_K, ONLY_Q):
        part = image[..., which.start * c : which.stop * c]
        joint.project(part, scales[which], image_rope, which, text=False)
    joint.project(text, scales, text_rope, ALL, image=False)
    joint.attend(text_first=True)
    first = torch.cat([joint.collect_text(), joint.collect_image()], 1)
    for which in (ONLY_V, ONLY_K, ONLY_Q):
        joint.project(image[..., which.start * c : which.stop * c], scales[which], None, which, text=False)
    joint.attend(image_only=True)
    first[:, local_text:] += joint.collect_image()
    both = torch.cat([text, image], 1) + first.repeat(1, 1, 3)
    for which in joint.parts:
        joint.project(both[..., which.start * c : which.stop * c], scales[which], rope, which)
    joint.attend()
    done = (first + joint.collect())[:, local_text:]
    return gather.all_gather(done)() if gather else done[None]


def check(transport: Transport, layout: Layout, mesh, packed, shape: tuple[int, ...], pipelined: bool) -> float:
    """The largest relative difference over an eager turn, a captured one and ten replays."""
    batch, text_tokens, image_tokens, head_dim = shape
    device, position = mesh.device, mesh.sequence_position
    generator = torch.Generator().manual_seed(text_tokens)
    _, attend = choose("auto", device, DTYPE, (HEADS // layout.ulysses, head_dim), ring=layout.ring > 1)
    own_mesh = single_rank_mesh(device)
    joints, all_shards = [], []
    for where, how, on_wire in ((mesh, transport, packed), (own_mesh, Transport(own_mesh), None)):
        shards = SequenceShards(where.layout, text_tokens, image_tokens)
        links = how.connect(shards, batch, HEADS, head_dim, DTYPE, packed=on_wire, width=HEADS * head_dim)
        joints.append((JointAttention(where, attend, shards, links, overlap=True, pipelined=pipelined), links.gather))
        all_shards.append(shards)
    shards = all_shards[0]
    scales = (torch.rand(head_dim, generator=generator).to(device, DTYPE),) * 2 + (None,)
    angles = torch.rand(text_tokens + image_tokens, head_dim // 2, generator=generator).to(device)
    rope = angles.cos(), angles.sin()

    def local(x, dim=1):
        text, image = x.split([text_tokens, image_tokens], dim)
        return shards.take_text(text, position, dim=dim), shards.take_image(image, position, dim=dim)

    own_rope = tuple(torch.cat(local(r, 0)) for r in rope)
    zeros = torch.zeros(batch, len(angles), 3 * HEADS * head_dim, device=device, dtype=DTYPE)
    static = [t.clone() for t in local(zeros)]
    graph, output, worst = None, None, 0.0
    for turn in range(12):
        x = torch.randn(batch, len(angles), 3 * HEADS * head_dim, generator=generator).to(device, DTYPE)
        for target, value in zip(static, local(x), strict=True):
            target.copy_(value)
        with torch.inference_mode():
            if turn == 1:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    output = layer(*joints[0], *static, scales, own_rope)
            if graph is None:
                output = layer(*joints[0], *static, scales, own_rope)
            else:
                graph.replay()
            (expected,) = layer(*joints[1], x[:, :text_tokens], x[:, text_tokens:], scales, rope)
        got = shards.join_image(output).float()
        difference = ((got - expected.float()).norm() / expected.float().norm()).item()
        worst = max(worst, difference)
        assert difference < BOUNDS[packed], (
            f"position {position}, {layout}, {shape}, packed {packed}, turn {turn}: {difference}"
        )
    return worst


def ways(kind: str) -> list[tuple[torch.dtype | None, int, int]]:
    """How the wire is packed, how many bytes kernels write to a peer themselves, and from how many on messages that
    take two hops go in pieces."""
    all_ = 1 << 40
    written = [(None, 40_000, all_), (None, all_, all_)]
    pieces = [(None, 0, 0), (torch.int8, 0, 0)]
    return [(packed, 0, all_) for packed in BOUNDS] + (written if kind.startswith("symmetric") else pieces)


def main(kind: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    between = kind.endswith("nccl between machines")
    if between:
        os.environ |= NETWORK | {"NCCL_HOSTID": f"machine {rank // 2}"}
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    degrees = [2] if between else [u for u in range(1, world + 1) if world % u == 0]
    layouts = [Layout(ulysses=u, ring=world // u) for u in degrees]
    for layout, (packed, peers._WRITTEN, messages.PIECE) in itertools.product(layouts, ways(kind)):
        messages.TURN = messages.PIECE
        mesh = make_mesh(layout, device)
        transport = Transport(mesh, kind)
        transport.wire("auto")  # measures over an arena of its own
        assert "GB/s" in str(transport), transport
        for pipelined in (True, False) if between else (True,):
            worst = max(check(transport, layout, mesh, packed, shape, pipelined) for shape in SHAPES)
            torch.cuda.synchronize()
            dist.all_reduce(torch.zeros(1))
            how = f"packed {packed}, written {peers._WRITTEN}, piece {messages.PIECE}, pipelined {pipelined}"
            print(f"rank {rank}: {layout} over {kind}, {how}: largest difference {worst:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
