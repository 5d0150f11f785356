"""Qwen-Image and Qwen-Image-Edit (arXiv 2508.02324; any size with head dim 128) in their files' own key names, which
are diffusers'.

Two streams, text and image, attend jointly in every block; see flux.py for how a block is a schedule and why it
computes no modulations. Queries, keys and values are separate weights, so each travels while the next is computed.
After the last attention nothing reads the text any more: its half of the last block is left out.

Shapes: B batch, L tokens of this rank (text first), C hidden, H heads, D head dim = 128, M mlp width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import ONLY_K, ONLY_Q, ONLY_V, JointAttention, Rope
from ..errors import CheckpointError, RequestError
from ..prompt import Prompt
from ..weights.checkpoint import Sizes
from .family import HEAD_DIM, NO_RESIDUALS, FamilyConfig, Residuals, Transformer
from .layers import Activations, Gates, Linear, RMSNorm, rope_tables, timestep_embedding
from .positions import METHODS, References, image_positions
from .segments import Segments

AXES = (16, 56, 56)
THETA = 10_000.0
TIMESTEP_ZERO_MARK = "__index_timestep_zero__"
"""An empty tensor in files whose references are modulated as at timestep 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenImageConfig(FamilyConfig):
    """Sizes read from a file, and:

    mlp: width behind gelu.
    blocks: how many there are.
    reference_method: index, or index_timestep_zero, which Qwen-Image-Edit 2511 marks its files with.
    """

    family: ClassVar[str] = "Qwen-Image"
    runs: ClassVar[str] = "Qwen-Image and Qwen-Image-Edit"
    marks: ClassVar[frozenset[str]] = frozenset(("img_in.weight", "txt_norm.weight"))
    downscale: ClassVar[int] = 8
    patch: ClassVar[int] = 2
    takes_control: ClassVar[bool] = True
    encoders: ClassVar[str] = "that of CLIPLoader, type qwen_image (Qwen2.5-VL 7B, width 3584)"
    reference_methods: ClassVar[frozenset[str]] = frozenset(METHODS) - {"uxo"}

    mlp: int
    blocks: int
    reference_method: str = "index"

    @classmethod
    def from_sizes(cls, sizes: Sizes) -> "QwenImageConfig":
        """Raises CheckpointError for Mage-Flow, which has the same keys."""
        hidden, in_features = sizes.matrix("img_in.weight")
        out_features, context = sizes.matrix("proj_out.weight")[0], sizes.matrix("txt_in.weight")[1]
        if (out_features, context) == (128, 2560):
            raise CheckpointError(f"{sizes.path} holds Mage-Flow, which FastUSP does not run yet; it runs {cls.runs}")
        if in_features != out_features or in_features % cls.patch**2:
            raise CheckpointError(
                f"{sizes.path} takes {in_features} values per patch and gives {out_features}: it is no {cls.runs} model"
            )
        return cls(
            hidden=hidden,
            heads=sizes.heads(hidden, HEAD_DIM),
            channels=in_features // cls.patch**2,
            context=context,
            mlp=sizes.matrix("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
            blocks=sizes.count("transformer_blocks"),
            reference_method="index_timestep_zero" if sizes.has(TIMESTEP_ZERO_MARK) else "index",
        )

    def build(self) -> "QwenImage":
        return QwenImage(self)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear_1 = Linear(256, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n,) -> (n, C) in `dtype`."""
        return self.linear_2(F.silu(self.linear_1(timestep_embedding(timesteps, 256).to(dtype))))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, mlp: int):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": Linear(hidden, mlp)}), nn.Identity(), Linear(mlp, hidden)])

    def forward(self, x: Activations, run: Segments) -> torch.Tensor:
        return self.net[2](run.widen(self.net[0]["proj"], x))


class Attention(nn.Module):
    """The projections around the joint attention: `to_*` and `norm_*` of the image, `add_*` and `norm_added_*` of the
    text."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        dim = hidden // heads
        self.to_q, self.to_k, self.to_v = (Linear(hidden, hidden) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(hidden, hidden) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (RMSNorm(dim) for _ in range(4))
        self.to_out = nn.ModuleList([Linear(hidden, hidden)])
        self.to_add_out = Linear(hidden, hidden)

    def forward(self, txt: Activations, img: Activations, rope: tuple[Rope, Rope], joint: JointAttention):
        """Normed txt (B, Lt, C), img (B, Li, C), rope (text, image) -> attended tokens (B, Lt + Li, C), before their
        output projections."""
        for layer, norm, which in (
            (self.to_v, None, ONLY_V),
            (self.to_k, self.norm_k, ONLY_K),
            (self.to_q, self.norm_q, ONLY_Q),
        ):
            joint.project(layer(img), (norm and norm.weight,), rope[1], which, text=False)
        for layer, norm, which in (
            (self.add_v_proj, None, ONLY_V),
            (self.add_k_proj, self.norm_added_k, ONLY_K),
            (self.add_q_proj, self.norm_added_q, ONLY_Q),
        ):
            joint.project(layer(txt), (norm and norm.weight,), rope[0], which, image=False)
        joint.attend()
        return joint.collect()


class Block(nn.Module):
    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(config.hidden, 6 * config.hidden))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(config.hidden, 6 * config.hidden))
        self.attn = Attention(config.hidden, config.heads)
        self.img_mlp = FeedForward(config.hidden, config.mlp)
        self.txt_mlp = FeedForward(config.hidden, config.mlp)


class Modulations(NamedTuple):
    """The modulations of one evaluation: per block (text, image), and the final (shift, scale)."""

    blocks: list[tuple[Gates, Gates]]
    final: tuple[torch.Tensor, torch.Tensor]


class QwenImage(Transformer):
    """Parameters have their files' own names."""

    def __init__(self, config: QwenImageConfig):
        super().__init__(config)
        hidden, width = config.hidden, config.channels * config.patch**2
        self.img_in = Linear(width, hidden)
        self.txt_norm = RMSNorm(config.context)
        self.txt_in = Linear(config.context, hidden)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(hidden)})
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm_out = nn.ModuleDict({"linear": Linear(hidden, 2 * hidden)})
        self.proj_out = Linear(hidden, width)
        if config.reference_method == "index_timestep_zero":
            self.register_parameter(TIMESTEP_ZERO_MARK, nn.Parameter(torch.empty(0), requires_grad=False))

    def products(self) -> Iterator[Linear]:
        for block in self.transformer_blocks:
            for part in (block.attn, block.img_mlp, block.txt_mlp):
                yield from (layer for layer in part.modules() if isinstance(layer, Linear))

    def check(self, x: torch.Tensor, prompt: Prompt) -> None:
        super().check(x, prompt)
        if prompt.y is not None or prompt.guidance is not None:
            raise RequestError("Qwen-Image takes neither pooled text nor embedded guidance")

    def check_latents(self, x: torch.Tensor) -> None:
        """x (B, channels, h, w) or, with the frame axis of its VAE, (B, channels, 1, h, w)."""
        channels = self.config.channels
        if x.dim() == 5 and x.shape[2] > 1:
            raise RequestError(
                f"latents {tuple(x.shape)} hold {x.shape[2]} layers: Qwen-Image-Layered is not supported yet; give it "
                "one image per batch item"
            )
        if x.dim() not in (4, 5) or x.shape[1] != channels or not x.numel():
            raise RequestError(f"latents {tuple(x.shape)} do not fit the model: expected (B, {channels}, [1,] h, w)")

    def embed_text(self, context: torch.Tensor) -> torch.Tensor:
        return self.txt_in(self.txt_norm(context))

    def rope(self, text: int, grid: tuple[int, int], references: References, device: torch.device) -> tuple[Rope, Rope]:
        """Image tokens are at (0, row, column) counted from the middle, n // 2 of n; text follows on all three axes
        from half the longer side. As ComfyUI counts: diffusers' middle of an odd n is one later."""
        image = image_positions(grid, references, device, centred=True)
        words = torch.arange(text, device=device) + max(grid) // 2
        return rope_tables(words[:, None].expand(-1, 3), AXES, THETA), rope_tables(image, AXES, THETA)

    def modulations(self) -> list[Linear]:
        layers = [mod for block in self.transformer_blocks for mod in (block.txt_mod[1], block.img_mod[1])]
        return [*layers, self.norm_out["linear"]]

    def modulation_input(self, timesteps: torch.Tensor, prompt: Prompt, dtype: torch.dtype) -> torch.Tensor:
        """timesteps (n, B) -> (n, B, C), computed in `dtype`."""
        embedded = self.time_text_embed["timestep_embedder"](timesteps.flatten(), dtype)
        return F.silu(embedded).unflatten(0, timesteps.shape)

    def split_modulations(self, rows: torch.Tensor) -> Modulations:
        """One evaluation's rows (B, n, modulation_width) of modulations, as views; the text takes the first."""
        parts = rows.split(self.config.hidden, dim=-1)
        blocks = [
            (Gates(*(part[:, :1] for part in parts[first : first + 6])), Gates(*parts[first + 6 : first + 12]))
            for first in range(0, 12 * self.config.blocks, 12)
        ]
        *_, scale, shift = parts  # in this order, unlike the blocks'
        return Modulations(blocks, (shift, scale))

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        mods: Modulations,
        rope: tuple[Rope, Rope],
        joint: JointAttention,
        run: Segments,
        control: Residuals = NO_RESIDUALS,
    ) -> torch.Tensor:
        """img (B, Li, 4 channels) patches, txt (B, Lt, C) of `embed_text`, rope (text, image), control (B or 1, Li, C)
        -> velocity patches, as img."""
        img = self.img_in(img)
        txt_gates, img_gates = mods.blocks[0]
        txt_normed = run.norm(txt, txt_gates.shift, txt_gates.scale)
        img_normed = run.norm(img, img_gates.shift, img_gates.scale)
        length, following = txt.shape[1], [*mods.blocks[1:], None]
        blocks = zip(self.transformer_blocks, mods.blocks, following, strict=True)
        for i, (block, (txt_gates, img_gates), after) in enumerate(blocks):
            attended = block.attn(txt_normed, img_normed, rope, joint)
            txt_end, img_end = (gates[:2] for gates in after) if after else (None, mods.final)
            if txt_end:
                txt, txt_normed = _combine(
                    txt,
                    block.attn.to_add_out(run.activations(attended[:, :length])),
                    txt_gates,
                    txt_end,
                    block.txt_mlp,
                    run,
                )
            img, img_normed = _combine(
                img,
                block.attn.to_out[0](run.activations(attended[:, length:])),
                img_gates,
                img_end,
                block.img_mlp,
                run,
                control.after_input(i),
                last=after is None,
            )
        return self.proj_out(img_normed)


def _combine(
    x,
    attended,
    gates: Gates,
    end,
    mlp: FeedForward,
    run: Segments,
    residual: torch.Tensor | None = None,
    *,
    last: bool = False,
):
    """x and its projected attended tokens (B, L, C), the (shift, scale) that follow the block, what a ControlNet adds
    after it -> (x, normed x)."""
    x, normed = run.add_norm(x, attended, gates.gate, gates.mlp_shift, gates.mlp_scale)
    if residual is not None:
        x = x + residual
    return (run.exact if last else run).add_norm(x, mlp(normed, run), gates.mlp_gate, *end)
