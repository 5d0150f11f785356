"""An optimizer that a CUDA graph can hold, for train_shapes.py."""

import math

import torch


class Muon:
    """Momentum whose update of each matrix is made orthogonal by Newton-Schulz iterations (Jordan and others, 2024), as
    torch.optim.Muon's, but for matrices of one shape together, and with a rate that a CUDA graph reads from memory."""

    MOMENTUM, COEFFICIENTS, ITERATIONS = 0.95, (3.4445, -4.775, 2.0315), 5

    def __init__(self, matrices: list[torch.nn.Parameter], rate: torch.Tensor, decay: float):
        self._rate, self._decay = rate, decay
        shapes = {matrix.shape for matrix in matrices}
        self._groups = [[matrix for matrix in matrices if matrix.shape == shape] for shape in sorted(shapes)]
        self._averages = [torch.zeros(len(group), *group[0].shape, device=rate.device) for group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, average in zip(self._groups, self._averages, strict=True):
            gradients = torch.stack([matrix.grad for matrix in group])
            average.lerp_(gradients, 1 - self.MOMENTUM)
            update = self._orthogonal(gradients.lerp(average, self.MOMENTUM)).to(average.dtype)
            update *= self._rate * 0.2 * math.sqrt(max(group[0].shape))  # AdamW's size
            torch._foreach_mul_(group, 1 - self._rate * self._decay)
            torch._foreach_sub_(group, list(update))

    def _orthogonal(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > x.shape[2]:
            return self._orthogonal(x.mT).mT
        a, b, c = self.COEFFICIENTS
        x = x.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(self.ITERATIONS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x
