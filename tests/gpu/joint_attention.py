"""One rank of test_exchange.py, started by torchrun: joint attention over symmetric memory against one rank's
attention.

With fewer GPUs than ranks, ranks share one (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES).
"""

import os

import torch
import torch.distributed as dist

from fastusp_backend.attention import ALL, ONLY_K, ONLY_Q, ONLY_V, JointAttention
from fastusp_backend.attention.local import choose
from fastusp_backend.comm.mesh import Mesh, single_rank_mesh
from fastusp_backend.comm.shards import SequenceShards
from fastusp_backend.comm.symmetric import Arena, SymmetricExchange
from fastusp_backend.comm.ulysses import LocalExchange
from fastusp_backend.config import Layout

HEADS, DIM = 8, 128
DTYPE = torch.bfloat16


def layer(joint: JointAttention, text, image, scales, rope, local_text: int) -> torch.Tensor:
    """A double block's calls, then a single block's on its result: both kinds of message alternate as in the model."""
    text_rope = tuple(r[:local_text] for r in rope)
    image_rope = tuple(r[local_text:] for r in rope)
    c = HEADS * DIM
    for which in (ONLY_V, ONLY_K, ONLY_Q):
        part = image[..., which.start * c : which.stop * c]
        joint.project(part, scales[which], image_rope, which, text=False)
    joint.project(text, scales, text_rope, ALL, image=False)
    joint.attend()
    first = joint.collect()
    joint.project(torch.cat([text, image], 1) + first.repeat(1, 1, 3), scales, rope)
    joint.attend()
    return first + joint.collect()


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    layout = Layout(ulysses=world, ring=1)
    mesh = Mesh(layout=layout, rank=rank, device=device, ulysses=dist.group.WORLD)
    arena = Arena(dist.group.WORLD, device)
    _, attend = choose("auto", device, DTYPE)
    memory = torch.cuda.graph_pool_handle()
    worst = 0.0
    for batch, text_tokens, image_tokens in ((1, 64, 256), (1, 7, 333), (2, 301, 64), (1, 64, 256)):
        generator = torch.Generator().manual_seed(text_tokens)
        shards = SequenceShards(layout, text_tokens, image_tokens)
        whole = SequenceShards(Layout(ulysses=1, ring=1), text_tokens, image_tokens)
        exchange = SymmetricExchange(arena, shards, batch, HEADS, DIM, DTYPE)
        joint = JointAttention(mesh, attend, shards, exchange, overlap=True)
        own_exchange = LocalExchange(whole, batch, HEADS, DIM, torch.empty(0, dtype=DTYPE, device=device))
        alone = JointAttention(single_rank_mesh(device), attend, whole, own_exchange, overlap=True)
        scales = (torch.rand(DIM, generator=generator).to(device, DTYPE),) * 2 + (None,)
        angles = torch.rand(text_tokens + image_tokens, DIM // 2, generator=generator).to(device)
        rope = angles.cos(), angles.sin()

        def local(x, dim=1, shards=shards, text_tokens=text_tokens):
            text, image = x.split([text_tokens, x.shape[dim] - text_tokens], dim)
            return shards.take_text(text, rank, dim=dim), shards.take_image(image, rank, dim=dim)

        own_rope = tuple(torch.cat(local(r, 0)) for r in rope)
        text, image = (
            t.clone() for t in local(torch.zeros(batch, len(angles), 3 * HEADS * DIM, device=device, dtype=DTYPE))
        )
        graph, output = None, None
        for turn in range(12):
            x = torch.randn(batch, len(angles), 3 * HEADS * DIM, generator=generator).to(device, DTYPE)
            for target, value in zip((text, image), local(x), strict=True):
                target.copy_(value)
            with torch.inference_mode():
                if turn == 1:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                        output = layer(joint, text, image, scales, own_rope, shards.local_text)
                if graph is None:
                    output = layer(joint, text, image, scales, own_rope, shards.local_text)
                else:
                    graph.replay()
                expected = layer(alone, x[:, :text_tokens], x[:, text_tokens:], scales, rope, text_tokens)
            wanted = torch.cat(local(expected), 1).float()
            real = torch.cat(local(torch.ones_like(expected)), 1).bool()
            difference = ((output.float() - wanted)[real].norm() / wanted[real].norm()).item()
            worst = max(worst, difference)
            assert difference < 1e-2, f"rank {rank}, tokens {text_tokens} + {image_tokens}, turn {turn}: {difference}"
            torch.cuda.synchronize()
            dist.barrier()
    print(f"rank {rank}: largest relative difference {worst:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
