"""The element-wise segments between matrix products and exchanges: pure functions of tokens.

On GPUs each is one pass over the tokens by a kernel of our own (kernels/tokens.py, kernels/sandwich.py), which Triton
compiles, and gelu is the epilogue of the library's product. torch.compile has no part in it: its imports alone keep a
first prompt waiting for seven seconds. On CPU ranks, and where fusing is switched off, all are torch's separate
operations, against which the kernels are tested.

Shapes: x, y (B, L, C); shift, scale, gate (B, 1, C), or (B, n, C) where each token takes one of n rows (`by_row`).
"""

import torch
import torch.nn.functional as F

from ..kernels import sandwich, tokens
from ..kernels.fp8_product import Quantised
from .beside import Beside
from .layers import Activations, Linear, RMSNorm


class Segments:
    """What happens to tokens between two products.

    fused: in one pass over the tokens, on GPUs; else as torch's separate operations.
    fp8: what products take of norms and activations is quantised in the same pass, for products in fp8; `activations`
    does so with what comes from elsewhere.
    rows: (L,) int64, see `by_row`.
    beside: where the text's half of a block is computed; by default in turn with the image's.
    exact: the same segments without quantisation.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        fused: bool,
        fp8: bool = False,
        rows: torch.Tensor | None = None,
        beside: Beside | None = None,
    ):
        self._device, self._fused, self._fp8, self._rows = device, fused and tokens.available(device), fp8, rows
        self.beside = beside or Beside(device, active=False)
        self.exact = Segments(device, fused=fused, rows=rows, beside=self.beside) if fp8 else self

    def by_row(self, rows: torch.Tensor) -> "Segments":
        """The same for a model whose modulations may have several rows: rows (L,) says which one each of the rank's
        tokens takes, text first. A stream of fewer tokens is the image's. Modulations of one row stay what they are."""
        return Segments(self._device, fused=self._fused, fp8=self._fp8, rows=rows, beside=self.beside)

    def norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> Activations:
        """(1 + scale) layer_norm(x) + shift (adaLN)."""
        rows = self._rows_of(x, shift)
        if self._fused:
            return self._as_activations(x, *tokens.norm(x, shift, scale, rows, fp8=self._fp8))
        return self.activations(tokens.norm_reference(x, shift, scale, rows))

    def add(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x + gate y."""
        return (tokens.add if self._fused else tokens.add_reference)(x, y, gate, self._rows_of(x, gate))

    def add_norm(self, x, y, gate, shift, scale) -> tuple[torch.Tensor, Activations]:
        """x + gate y, and that normed."""
        rows = self._rows_of(x, gate)
        if self._fused:
            x, *normed = tokens.add_norm(x, y, gate, shift, scale, rows, fp8=self._fp8)
            return x, self._as_activations(x, *normed)
        x, normed = tokens.add_norm_reference(x, y, gate, shift, scale, rows)
        return x, self.activations(normed)

    def scaled_norm(self, x: torch.Tensor, before: RMSNorm, scale: torch.Tensor) -> Activations:
        """(1 + scale) before(x)."""
        if self._fused:
            return self._as_activations(x, *sandwich.norm(x, before.weight, scale, fp8=self._fp8))
        return self.activations(sandwich.norm_reference(x, before.weight, scale))

    def normed_add(self, x: torch.Tensor, y: torch.Tensor, after: RMSNorm, gate: torch.Tensor) -> torch.Tensor:
        """x + tanh(gate) after(y)."""
        return (sandwich.add if self._fused else sandwich.add_reference)(x, y, after.weight, gate)

    def normed_add_norm(self, x, y, after: RMSNorm, gate, before: RMSNorm, scale) -> tuple[torch.Tensor, Activations]:
        """x + tanh(gate) after(y), and (1 + scale) times that normed by `before`."""
        if self._fused:
            x, *normed = sandwich.add_norm(x, y, after.weight, gate, before.weight, scale, fp8=self._fp8)
            return x, self._as_activations(x, *normed)
        x = self.normed_add(x, y, after, gate)
        return x, self.scaled_norm(x, before, scale)

    def swiglu(self, gate: torch.Tensor, value: torch.Tensor) -> Activations:
        """silu(gate) value."""
        if self._fused:
            return self._as_activations(gate, *sandwich.swiglu(gate, value, fp8=self._fp8))
        return self.activations(sandwich.swiglu_reference(gate, value))

    def mlp_in(self, layer: Linear, x: Activations, rows: slice = slice(None), *, gated: bool = False) -> Activations:
        """gelu_tanh(layer(x)) for some of the layer's outputs; gated: silu of their first half times the second."""
        if not gated and not self._fp8:
            return _gelu_linear(x, *layer.rows(rows, x.dtype))
        wide = layer(x, rows)
        if self._fused and self._fp8:
            return self._as_activations(wide, *(tokens.swiglu_quantise if gated else tokens.gelu_quantise)(wide))
        if self._fused:
            return tokens.swiglu(wide)
        return self.activations((tokens.swiglu_reference if gated else tokens.gelu_reference)(wide))

    def activations(self, x: torch.Tensor) -> Activations:
        """x (B, L, K) as products take it."""
        if not self._fp8:
            return x
        return self._as_activations(x, *(tokens.quantise_tokens if self._fused else tokens.quantise_reference)(x))

    def _as_activations(self, like: torch.Tensor, *parts: torch.Tensor) -> Activations:
        """Either the tensor alone, or values and scales."""
        return Quantised(*parts, like.dtype) if self._fp8 else parts[0]

    def _rows_of(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor | None:
        """The row of its modulation that each token of x takes; None where there is but one."""
        if self._rows is None or modulation.shape[1] == 1:
            return None
        return self._rows[len(self._rows) - x.shape[1] :]


def _gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b); on GPUs the library applies it as the product's epilogue."""
    if x.is_cuda and x.dtype != torch.float32:
        flat = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return tokens.gelu_reference(F.linear(x, weight, bias))
