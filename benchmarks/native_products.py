"""What a product costs on one GPU in the types that its tensor cores may have: microseconds of torch's products in
8 and 4 bits, with the scales of rows, beside bfloat16's.

Activations are in the product's type already: rounding them comes on top. Values are random, and so are no results.
A type that the GPU, or this torch, has no product for is named with the reason.
"""

import argparse
from collections.abc import Callable, Iterator

import paths  # noqa: F401
import torch
from segments import SETS, microseconds

SIZES = (2304, 3072, 12288), (4608, 3072, 9216)
"""M, K, N of x (M, K) W^T (K, N): into FLUX's MLP on one of two ranks, and to queries, keys and values on one rank."""
BLACKWELL = (10, 0)
"""The first compute capability with products whose scales are of blocks."""
Product = tuple[Callable, list[tuple[torch.Tensor, ...]]]


def draw(kind: torch.dtype, *shape: int, device: torch.device) -> torch.Tensor:
    """Random values of a type: all bits take part, since a GPU that multiplies zeros is faster."""
    if kind == torch.int8:
        return torch.randint(-127, 128, shape, dtype=kind, device=device)
    if kind == torch.float4_e2m1fn_x2:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(kind)
    return torch.randn(shape, device=device).to(kind)


def operands(kind: torch.dtype, m: int, k: int, n: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """x and W, which take turns with others."""
    return [(draw(kind, m, k, device=device), draw(kind, n, k, device=device)) for _ in range(SETS)]


def scales(m: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x's rows, and of W's."""
    return torch.rand(m, 1, device=device), torch.rand(1, n, device=device)


def bf16(m: int, k: int, n: int, device: torch.device) -> Product:
    return torch.nn.functional.linear, operands(torch.bfloat16, m, k, n, device)


def fp8_rows(m: int, k: int, n: int, device: torch.device) -> Product:
    """The scales are applied by the product, as it writes."""

    def run(x, weight, rows, columns):
        return torch._scaled_mm(x, weight.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return run, [(*pair, *scales(m, n, device)) for pair in operands(torch.float8_e4m3fn, m, k, n, device)]


def int8_sums(m: int, k: int, n: int, device: torch.device) -> Product:
    """Sums of integers, without scales."""
    return lambda x, weight: torch._int_mm(x, weight.t()), operands(torch.int8, m, k, n, device)


def int8_rows(m: int, k: int, n: int, device: torch.device) -> Product:
    """The scales are one more pass over the sums, as the compiler writes it."""
    scaled = torch.compile(lambda sums, rows, columns: (sums * rows * columns).bfloat16(), dynamic=False)
    multiply, pairs = int8_sums(m, k, n, device)

    def run(x, weight, rows, columns):
        return scaled(multiply(x, weight), rows, columns)

    return run, [(*pair, *scales(m, n, device)) for pair in pairs]


def mxfp8(m: int, k: int, n: int, device: torch.device) -> Product:
    """A scale, a power of two, for each 32 values."""
    return _of_blocks(m, k, n, device, torch.float8_e4m3fn, torch.float8_e8m0fnu, block=32, each=1)


def nvfp4(m: int, k: int, n: int, device: torch.device) -> Product:
    """A scale in e4m3 for each 16 values, of which a byte has two."""
    return _of_blocks(m, k, n, device, torch.float4_e2m1fn_x2, torch.float8_e4m3fn, block=16, each=2)


def _of_blocks(m, k, n, device, values: torch.dtype, of_blocks: torch.dtype, *, block: int, each: int) -> Product:
    """each: values in a byte."""
    if torch.cuda.get_device_capability(device) < BLACKWELL:
        raise RuntimeError("scales of blocks need a GPU of compute capability 10.0 or newer")

    def operand(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = -(-rows // 128) * 128 * (-(-k // block // 4) * 4)  # as tensor cores read them, in tiles of 128 x 4
        known = torch.randint(1, 64, (count,), dtype=torch.uint8, device=device).view(of_blocks)
        return draw(values, rows, k // each, device=device), known

    def run(x, x_scales, weight, weight_scales):
        return torch._scaled_mm(x, weight.t(), x_scales, weight_scales, out_dtype=torch.bfloat16)

    return run, [operand(m) + operand(n) for _ in range(SETS)]


PRODUCTS = {
    "bf16": bf16,
    "fp8, row scales": fp8_rows,
    "int8, sums alone": int8_sums,
    "int8, row scales": int8_rows,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
}


def lines(device: torch.device, count: int) -> Iterator[str]:
    """A table's rows."""
    for m, k, n in SIZES:
        plain = None
        for name, make in PRODUCTS.items():
            try:
                taken = microseconds(*make(m, k, n, device), count)
            except (RuntimeError, ValueError, NotImplementedError) as refused:
                yield f"{m:6}{k:6}{n:7}  {name:18}skipped: {str(refused).splitlines()[0]}"
                continue
            plain = plain or taken
            yield f"{m:6}{k:6}{n:7}  {name:18}{taken:9.1f}{plain / taken:8.2f}{2 * m * k * n / taken / 1e6:9.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="replays that are timed (default 50)")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us of a product in a CUDA graph\n")
    print(f"{'M':>6}{'K':>6}{'N':>7}  {'product':18}{'us':>9}{'x bf16':>8}{'TFLOP/s':>9}")
    for line in lines(torch.device("cuda"), arguments.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
