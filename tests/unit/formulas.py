"""What the tests of weight patches share: a weight, its patches, and parts of their formulas written out in float64."""

import torch
from support import randn

from fastusp_backend.config import WeightPatch
from fastusp_backend.weights.adapters import apply, check

OUT, IN, RANK = 12, 8, 3
WEIGHT = randn(OUT, IN, seed=0)


def tensors_of(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {role: randn(*shape, seed=seed) for seed, (role, shape) in enumerate(shapes.items(), 1)}


def patched(kind: str, parts: dict[str, torch.Tensor], weight: torch.Tensor = WEIGHT, **more) -> torch.Tensor:
    patch = WeightPatch(kind=kind, tensors={role: role for role in parts}, **({"strength": 0.7} | more))
    check(patch, parts, tuple(weight.shape))
    return apply(weight.clone(), patch, parts)


def assert_is(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b as a sum of outer products."""
    return sum(torch.outer(a[:, r].double(), b[r].double()) for r in range(a.shape[1]))


W = WEIGHT.double()


def kronecker(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Blocks of b, each times one element of a."""
    return torch.cat([torch.cat([x.double() * b.double() for x in row], dim=1) for row in a])


def rotations(blocks: torch.Tensor, constraint: float) -> list[torch.Tensor]:
    """(I + Q) / (I - Q) of blocks' skew parts Q, which together are no longer than the constraint, if there is one."""
    skews = blocks.double() - blocks.double().transpose(-1, -2)
    length = skews.square().sum().sqrt()
    skews = skews * (constraint / length if 0 < constraint < length else 1)
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return [(eye + q) @ torch.linalg.inv(eye - q) for q in skews.flatten(0, -3)]
