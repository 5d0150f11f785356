"""Products of weights in Q8_0, on one GPU: milliseconds of the products and attention of single-stream blocks, their
weights unpacked in several ways, beside the same in bfloat16.

serial: each weight by one kernel before its product, as the engine does it. ahead: the next weight on a second stream,
while the product before it runs, by as many programs as said (each loops), so that few multiprocessors are taken from
the product. inside: the product reads packed values and multiplies them by their scales on their way. parts: so many
bytes of a weight are unpacked and multiplied before the next ones come to the same place, so that they need not leave
the GPU's cache.
"""

import argparse
import functools
from collections.abc import Callable

import paths  # noqa: F401
import torch
import triton
import triton.language as tl
from segments import replayed
from storages import STORAGES
from tiles import heat

from fastusp_backend.kernels import gguf_blocks
from fastusp_backend.weights.packings import PACKINGS

ROWS = 2304
"""Of one of two ranks."""
HIDDEN, MLP, HEADS, TOKENS = 3072, 12288, 12, 4608
WEIGHTS = ((3 * HIDDEN, HIDDEN), (MLP, HIDDEN), (HIDDEN, HIDDEN + MLP))
BLOCKS = 8
TILE = 4096
"""Values of a program's turn."""


@triton.jit
def _unpack_by_few(packed, out, blocks, COUNT: tl.constexpr):
    for turn in range(tl.program_id(0), tl.cdiv(blocks, COUNT), tl.num_programs(0)):
        number = turn * COUNT + tl.arange(0, COUNT)[:, None]
        inside, j = number < blocks, tl.arange(0, 32)[None, :]
        block = packed + number * 34
        scale = tl.load(block.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)
        code = tl.load(block + 2 + j, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        tl.store(out + number * 32 + j, (code * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inside(
    x, codes, scales, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # x (M, K), codes (N, K), scales (N, K / 32) -> out (M, N); the weight is the operand that may stay in registers
    tile, high = tl.program_id(0), tl.cdiv(M, BM)
    m, n = tile % high * BM + tl.arange(0, BM), tile // high * BN + tl.arange(0, BN)
    sums = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        code = tl.load(codes + n[:, None] * K + depth[None, :]).to(x.dtype.element_ty)
        scale = tl.load(scales + n[:, None] * (K // 32) + (k // 32 + tl.arange(0, BK // 32))[None, :]).to(
            x.dtype.element_ty
        )
        weight = tl.reshape(tl.reshape(code, (BN, BK // 32, 32)) * scale[:, :, None], (BN, BK))
        sums = tl.dot(weight, tl.load(x + m[None, :] * K + depth[:, None]), sums)
    tl.store(out + m[None, :] * N + n[:, None], sums.to(out.dtype.element_ty))


def by_few(packed: torch.Tensor, out: torch.Tensor, programs: int) -> None:
    _unpack_by_few[(programs,)](packed, out, out.numel() // 32, COUNT=TILE // 32, num_warps=8)


def by_many(packed: torch.Tensor, out: torch.Tensor) -> None:
    gguf_blocks.unpack(packed, "Q8_0", *PACKINGS["Q8_0"][:2], out)


class Work:
    """The products and attention of some blocks: `plain` (bf16) and `packed` weights, the same ones."""

    def __init__(self, device: torch.device):
        draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
        self._x = {k: draw(ROWS, k) for k in {k for _, k in WEIGHTS}}
        self._heads = [draw(1, HEADS, TOKENS, 128) for _ in range(3)]
        self.packed = [STORAGES["Q8_0"](draw(n, k) * k**-0.5).data for _ in range(BLOCKS) for n, k in WEIGHTS]
        self.plain = []
        for number, packed in enumerate(self.packed):
            self.plain.append(draw(*WEIGHTS[number % len(WEIGHTS)]))
            by_many(packed, self.plain[-1])
        self._side = torch.cuda.Stream(priority=0)

    def _product(self, number: int, product: Callable) -> torch.Tensor:
        out = product(self._x[WEIGHTS[number % len(WEIGHTS)][1]])
        if number % len(WEIGHTS) == 0:
            torch.nn.functional.scaled_dot_product_attention(*self._heads)
        return out

    def _by(self, weight: torch.Tensor) -> Callable:
        return lambda x: torch.nn.functional.linear(x, weight)

    def bf16(self) -> torch.Tensor:
        for number, weight in enumerate(self.plain):
            out = self._product(number, self._by(weight))
        return out

    def serial(self, unpack: Callable) -> torch.Tensor:
        for number, packed in enumerate(self.packed):
            weight = torch.empty_like(self.plain[number])
            unpack(packed, weight)
            out = self._product(number, self._by(weight))
        return out

    def parts(self, size: int) -> torch.Tensor:
        for number, packed in enumerate(self.packed):
            n, k = self.plain[number].shape
            rows = triton.cdiv(n, triton.cdiv(n * k * 2, size) * 128) * 128  # as even as they can be, of whole tiles
            place = packed.new_empty(rows, k, dtype=torch.bfloat16)

            def product(x, packed=packed, n=n, rows=rows, place=place):
                out = x.new_empty(len(x), n)
                for first in range(0, n, rows):
                    count = min(rows, n - first)
                    by_many(packed[first : first + count], place[:count])
                    torch.mm(x, place[:count].t(), out=out[:, first : first + count])
                return out

            out = self._product(number, product)
        return out

    def ahead(self, unpack: Callable) -> torch.Tensor:
        main, side = torch.cuda.current_stream(), self._side
        room = [torch.empty(max(w.numel() for w in self.plain), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        there = [torch.cuda.Event() for _ in self.packed]
        for number in range(len(self.packed) + 1):
            if number < len(self.packed):
                side.wait_event(main.record_event())  # of the last product but one, which frees the room
                with torch.cuda.stream(side):
                    unpack(self.packed[number], self._room(room, number))
                there[number].record(side)
            if number > 0:
                main.wait_event(there[number - 1])
                out = self._product(number - 1, self._by(self._room(room, number - 1)))
        return out

    def _room(self, room: list[torch.Tensor], number: int) -> torch.Tensor:
        like = self.plain[number]
        return room[number % 2][: like.numel()].view(like.shape)

    def inside(self, tile: tuple[int, ...]) -> torch.Tensor:
        bm, bn, bk, stages, warps = tile
        for number, (codes, scales) in enumerate(self._apart()):
            n, k = codes.shape
            out = codes.new_empty(ROWS, n, dtype=torch.bfloat16)

            def product(x, codes=codes, scales=scales, out=out, n=n, k=k):
                grid = (ROWS // bm * (n // bn),)
                more = {"BM": bm, "BN": bn, "BK": bk, "num_stages": stages, "num_warps": warps}
                _inside[grid](x, codes, scales, out, ROWS, n, k, **more)
                return out

            self._product(number, product)
        return out

    @functools.cache  # noqa: B019
    def _apart(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for packed in self.packed:
            blocks = packed.unflatten(1, (-1, 34))
            codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
            found.append((codes, blocks[..., :2].contiguous().view(torch.float16).flatten(1)))
        return found


def milliseconds(run: Callable[[], torch.Tensor], count: int) -> float:
    """Of all blocks, in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replayed(graph, count)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="replays that are timed (default 60)")
    count = parser.parse_args().count
    work = Work(torch.device("cuda"))
    ways: dict[str, Callable] = {"bf16": work.bf16, "serial": functools.partial(work.serial, by_many)}
    ways["ahead, all"] = functools.partial(work.ahead, by_many)
    for programs in (16, 64, 264):
        unpack = functools.partial(by_few, programs=programs)
        ways[f"ahead, {programs}"] = functools.partial(work.ahead, unpack)
    ways["serial, 528"] = functools.partial(work.serial, functools.partial(by_few, programs=528))
    for size in (10, 15, 20, 30, 40, 50):
        ways[f"parts, {size} MB"] = functools.partial(work.parts, size * 10**6)
    for tile in ((128, 128, 64, 4, 8), (256, 128, 64, 3, 8)):
        ways[f"inside, {'x'.join(map(str, tile))}"] = functools.partial(work.inside, tile)
    ways["bf16 again"] = work.bf16
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: ms of {BLOCKS} blocks of {ROWS} rows\n")
    plain, expected = None, work.bf16().float()
    for name, run in ways.items():
        error = ((run().float() - expected).norm() / expected.norm()).item()
        heat(1.0, work._x[HIDDEN], work.plain[0])
        taken = milliseconds(run, count)
        plain = plain or taken
        print(f"{name:28}{taken:8.3f}{taken / plain:7.3f}   {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
