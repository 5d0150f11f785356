"""Products with tiles of our own beside cuBLAS', on one GPU: microseconds under a load that lasts.

As many rows as one of two ranks has do not fill a GPU's last wave of tiles. A persistent kernel of as many programs as
the GPU has multiprocessors takes the whole waves tile by tile; what is left of the tiles it either takes so too, or
shares out evenly by their iterations over K (stream-K, arXiv 2301.03598), which needs a float32 tile of the parts.
"""

import argparse
import time
from collections.abc import Iterator

import paths  # noqa: F401
import torch
import triton
import triton.language as tl
from segments import SETS, microseconds
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 2304
SHAPES = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072))
"""K and N of FLUX's products."""
TILES = ((128, 256, 64, 3, 8), (128, 128, 64, 4, 4), (256, 128, 64, 3, 8))
"""Rows and columns of a tile, depth of an iteration, stages, warps."""


@triton.jit
def _iterations(x, w, m, n, first, last, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(first, last):
        sums = tl.dot(x.load([m * BM, k * BK]), w.load([n * BN, k * BK]).T, sums)
    return sums


@triton.jit
def _product(
    x, w, out, parts, counts, M, K, WHOLE, TOTAL, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # x (M, K), w (N, K), out (M, N); parts (tiles, BM, BN) and counts (tiles) of the last tiles are 0, and stay so
    program, programs = tl.program_id(0), tl.num_programs(0)
    high, depth = tl.cdiv(M, BM), K // BK
    for tile in range(program, WHOLE, programs):
        sums = _iterations(x, w, tile % high, tile // high, 0, depth, BM, BN, BK)
        out.store([tile % high * BM, tile // high * BN], sums.to(out.dtype))
    share = tl.cdiv((TOTAL - WHOLE) * depth, programs)
    begin, end = program * share, tl.minimum((program + 1) * share, (TOTAL - WHOLE) * depth)
    while begin < end:
        late = begin // depth
        tile, first = WHOLE + late, begin % depth
        last = tl.minimum(depth, first + end - begin)
        sums = _iterations(x, w, tile % high, tile // high, first, last, BM, BN, BK)
        if last - first == depth:
            out.store([tile % high * BM, tile // high * BN], sums.to(out.dtype))
        else:
            place = parts + late * BM * BN + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.atomic_add(place, sums, sem="relaxed")
            tl.debug_barrier()
            before = tl.atomic_add(counts + late, last - first, sem="acq_rel")
            tl.debug_barrier()
            if before + last - first == depth:  # all parts are there
                out.store([tile % high * BM, tile // high * BN], tl.load(place, volatile=True).to(out.dtype))
                tl.store(place, tl.zeros((BM, BN), tl.float32))
                tl.store(counts + late, 0)
        begin += last - first


class Tiles:
    """x (M, K) W^T (K, N) by the kernel above, of tiles of one kind."""

    def __init__(self, m: int, n: int, k: int, tile: tuple[int, ...], *, shared: bool, device: torch.device):
        self._bm, self._bn, self._bk, self._stages, self._warps = tile
        if m % self._bm or n % self._bn or k % self._bk:
            raise ValueError(f"tiles of {self._bm} x {self._bn} do not divide {m} x {n}")
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._total = m // self._bm * (n // self._bn)
        self._whole = self._total // self._programs * self._programs if shared else self._total
        late = max(1, self._total - self._whole)
        self._parts = torch.zeros(late, self._bm, self._bn, device=device)
        self._counts = torch.zeros(late, dtype=torch.int32, device=device)

    def __call__(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), len(w))
        _product[(self._programs,)](
            TensorDescriptor.from_tensor(x, [self._bm, self._bk]),
            TensorDescriptor.from_tensor(w, [self._bn, self._bk]),
            TensorDescriptor.from_tensor(out, [self._bm, self._bn]),
            self._parts,
            self._counts,
            len(x),
            x.shape[1],
            self._whole,
            self._total,
            BM=self._bm,
            BN=self._bn,
            BK=self._bk,
            num_stages=self._stages,
            num_warps=self._warps,
        )
        return out


def heat(seconds: float, x: torch.Tensor, w: torch.Tensor) -> None:
    """Brings the GPU to its power limit, as a step does."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(50):
            torch.nn.functional.linear(x, w)
        torch.cuda.synchronize()


def lines(device: torch.device, count: int) -> Iterator[str]:
    for k, n in SHAPES:
        pairs = [
            tuple(torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (ROWS, n)) for _ in range(SETS)
        ]
        expected = torch.nn.functional.linear(*pairs[0]).float()

        def line(name: str, run, k=k, n=n, pairs=pairs, expected=expected) -> str:
            try:
                error = ((run(*pairs[0]).float() - expected).norm() / expected.norm()).item()
                heat(1.0, *pairs[0])
                taken = microseconds(run, pairs, count)
            except Exception as refused:  # whatever a Triton does not take is a row of the table
                return f"{k:6}{n:7}  {name:34}skipped: {(str(refused).splitlines() or [''])[0][:80]}"
            return f"{k:6}{n:7}  {name:34}{taken:9.1f}{2 * ROWS * k * n / taken / 1e6:9.0f}   {error:.0e}"

        yield line("cuBLAS", torch.nn.functional.linear)
        for tile in TILES:
            for shared in (False, True):
                name = f"{'x'.join(map(str, tile))}{', stream-K' if shared else ''}"
                try:
                    made = Tiles(ROWS, n, k, tile, shared=shared, device=device)
                except ValueError as refused:
                    yield f"{k:6}{n:7}  {name:34}skipped: {refused}"
                    continue
                yield line(name, made)
        yield line("cuBLAS again", torch.nn.functional.linear)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30, help="replays that are timed (default 30)")
    arguments = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us of a product of {ROWS} rows in a CUDA graph\n"
    )
    print(f"{'K':>6}{'N':>7}  {'product':34}{'us':>9}{'TFLOP/s':>9}   error")
    for line in lines(torch.device("cuda"), arguments.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
