"""The element-wise segments between matrix products and exchanges: pure functions of tokens, fused on GPUs.

Norms, gelu and their quantisation are kernels of our own (kernels/tokens.py); what is left is compiled once for all
blocks: weights and modulations are arguments and the token dimension is dynamic, so that neither another block nor
another image size compiles anything. The compiler never sees a collective.

Shapes: x, y (B, L, C); shift, scale, gate (B, 1, C).
"""

import copy
import functools

import torch
import torch.nn.functional as F

from ..kernels import tokens
from .layers import Activations, Linear
from .products import Quantised


def _then_quantise(segment):
    """`segment` with the last of its results, tokens, quantised (see products.py)."""

    def quantised(*tensors: torch.Tensor):
        result = segment(*tensors)
        *first, last = result if isinstance(result, tuple) else (result,)
        return (*first, *tokens.quantise_reference(last))

    return quantised


def _in_tuple(segment):
    def in_tuple(*tensors: torch.Tensor):
        result = segment(*tensors)
        return result if isinstance(result, tuple) else (result,)

    return in_tuple


def _by_row(segment, streams: int):
    """`segment` for modulations of several rows (B, n, C), of which token l takes row rows[0, l]. streams: how many of
    its arguments are (B, L, C)."""

    def chosen(rows: torch.Tensor, *tensors: torch.Tensor):
        return segment(*tensors[:streams], *(tensor[:, rows[0]] for tensor in tensors[streams:]))

    return chosen


class Segments:
    """norm: adaLN, (1 + scale) layer_norm(x) + shift. add: x + gate y. add_norm: both, returning (x, normed). widen: an
    MLP's first layer and its gelu, or its SwiGLU.

    fused: in one pass over the tokens, on GPUs; else as torch's separate operations.
    fp8: what norm, add_norm and widen give is quantised in the same pass, for products in fp8; `activations` does so
    with what comes from elsewhere. exact: the same segments without.
    """

    def __init__(self, device: torch.device, *, fused: bool, fp8: bool = False):
        fused = fused and tokens.available(device)
        wrap = _compiled if fused else (lambda function: function)
        pack = _then_quantise if fp8 else _in_tuple
        norm, add_norm = pack(tokens.norm_reference), pack(tokens.add_norm_reference)
        segments = {"norm": (norm, 1), "add": (tokens.add_reference, 2), "add_norm": (add_norm, 2)}
        self._plain = {name: wrap(segment) for name, (segment, _) in segments.items()}
        self._chosen = {name: wrap(_by_row(segment, streams)) for name, (segment, streams) in segments.items()}
        self._swiglu = _then_quantise(tokens.swiglu_reference) if fp8 else wrap(tokens.swiglu_reference)
        self._quantise, self._gelu = tokens.quantise_reference, _then_quantise(tokens.gelu_reference)
        if fused:
            for name, kernel in (("norm", tokens.norm), ("add_norm", tokens.add_norm)):
                self._plain[name] = functools.partial(kernel, fp8=fp8)
            self._quantise, self._gelu = tokens.quantise_tokens, tokens.gelu_quantise
            self._swiglu = tokens.swiglu_quantise if fp8 else self._swiglu
        self._fp8 = fp8
        self.exact = Segments(device, fused=fused) if fp8 else self

    def norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> Activations:
        normed = self._plain["norm"](x, shift, scale)
        return Quantised(*normed, x.dtype) if self._fp8 else normed[0]

    def add(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self._plain["add"](x, y, gate)

    def add_norm(self, x, y, gate, shift, scale) -> tuple[torch.Tensor, Activations]:
        x, *normed = self._plain["add_norm"](x, y, gate, shift, scale)
        return x, Quantised(*normed, x.dtype) if self._fp8 else normed[0]

    def widen(self, layer: Linear, x: Activations, rows: slice = slice(None), *, gated: bool = False) -> Activations:
        """gelu_tanh(layer(x)) for some of the layer's outputs; gated: silu of their first half times the second."""
        if gated:
            wide = self._swiglu(layer(x, rows))
            return Quantised(*wide, x.dtype) if self._fp8 else wide
        if self._fp8:
            return Quantised(*self._gelu(layer(x, rows)), x.dtype)
        return _gelu_linear(x, *layer.rows(rows, x.dtype))

    def activations(self, x: torch.Tensor) -> Activations:
        """x (B, L, K) as products take it."""
        return Quantised(*self._quantise(x), x.dtype) if self._fp8 else x

    def by_row(self, rows: torch.Tensor) -> "Segments":
        """The same for a model whose modulations may have several rows: rows (L,) says which one each of the rank's
        tokens takes, text first. A stream of fewer tokens is the image's. Modulations of one row stay what they are."""
        chosen = copy.copy(self)
        chosen._plain = {
            name: _either(self._plain[name], segment, rows[None]) for name, segment in self._chosen.items()
        }
        chosen.exact = self.exact.by_row(rows) if self._fp8 else chosen
        return chosen


def _either(plain, chosen, rows: torch.Tensor):
    def either(*tensors: torch.Tensor):
        if tensors[-1].shape[1] == 1:
            return plain(*tensors)
        return chosen(rows[:, -tensors[0].shape[1] :], *tensors)

    return either


def wake_compiler(device: torch.device) -> None:
    """Compiles next to nothing: torch.compile's first use imports for seconds, which a process may as well spend while
    nothing is asked of it."""
    torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(1, device=device))


def _compiled(function):
    fast = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*tensors: torch.Tensor):
        for tensor in tensors:
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return fast(*tensors)

    return call


def _gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b); on GPUs the library applies it as the product's epilogue."""
    if x.is_cuda and x.dtype != torch.float32:
        flat = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return tokens.gelu_reference(F.linear(x, weight, bias))
