"""One evaluation of FLUX over all ranks: latents in, velocity out, both whole on every rank.

Shapes: B batch, C latent channels, h w latent height and width, S image tokens, T text tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..attention import USPAttention
from ..attention.local import choose
from ..comm.exchange import CollectiveExchange
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..config import Settings
from ..errors import RequestError
from ..models.flux import AXES, PATCH, THETA, Flux
from ..models.layers import rope_tables


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a prompt gives the model: context (B, T, E), y (B, V) pooled text, guidance (B,) or (1,)."""

    context: torch.Tensor
    y: torch.Tensor | None = None
    guidance: torch.Tensor | None = None


class Denoiser:
    """velocity = denoiser(x, timestep, conditioning), computed by all ranks of the mesh together."""

    def __init__(self, model: Flux, mesh: Mesh, settings: Settings, dtype: torch.dtype):
        self.model = model
        self.mesh = mesh
        self.dtype = dtype
        self.attention_name, attend = choose(settings.attention, mesh.device, dtype)
        self._attention = USPAttention(mesh, attend)
        self._gather = CollectiveExchange(mesh.world) if mesh.world else None

    def check(self, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Raises RequestError for tensors that do not fit the model."""
        config, b = self.model.config, len(x) if x.dim() else 0
        context, y, guidance = conditioning.context, conditioning.y, conditioning.guidance
        if x.dim() != 4 or x.shape[1] != config.channels or not x.numel():
            raise RequestError(f"latents {tuple(x.shape)} do not fit the model: expected (B, {config.channels}, h, w)")
        if context.dim() != 3 or context.shape[0] != b or context.shape[1] < 1 or context.shape[2] != config.context:
            raise RequestError(
                f"the prompt's tensor {tuple(context.shape)} does not fit the model: expected ({b}, T, "
                f"{config.context}). "
                "Was it made by the text encoders of another model?"
            )
        if y is not None and (y.dim() != 2 or y.shape[0] != b or y.shape[1] < config.pooled):
            raise RequestError(
                f"the pooled text {tuple(y.shape)} does not fit the model: expected ({b}, {config.pooled})"
            )
        if guidance is not None and guidance.shape not in ((1,), (b,)):
            raise RequestError(f"the guidance {tuple(guidance.shape)} does not fit the latents: expected ({b},)")

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """x (B, C, h, w), timestep (B,) in [0, 1] -> velocity (B, C, h, w) in the compute type."""
        height, width = x.shape[-2:]
        context = conditioning.context.to(self.dtype)
        patches = patchify(x.to(self.dtype))
        grid = -(-height // PATCH), -(-width // PATCH)
        shards = SequenceShards(self.mesh.layout, context.shape[1], patches.shape[1])
        rank = self.mesh.rank

        text_ids, image_ids = positions(context.shape[1], grid, x.device)
        mods = self.model.modulations(timestep, conditioning.guidance, conditioning.y, self.dtype)
        velocity = self.model(
            shards.take_image(patches, rank, dim=1),
            shards.take_text(context, rank, dim=1),
            mods,
            (
                rope_tables(shards.take_text(text_ids, rank, dim=0), AXES, THETA),
                rope_tables(shards.take_image(image_ids, rank, dim=0), AXES, THETA),
            ),
            lambda q, k, v: self._attention(q, k, v, shards),
        )
        parts = self._gather.all_gather(velocity)() if self._gather else velocity[None]
        return unpatchify(shards.join_image(parts), grid)[..., :height, :width]


def patchify(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, h, w) -> (B, S, 4 C) in channel, row, column order; odd sizes are padded circularly, as ComfyUI pads
    them."""
    b, c, height, width = x.shape
    x = F.pad(x, (0, width % PATCH, 0, height % PATCH), mode="circular")
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH**2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """tokens (B, S, 4 C), grid (rows, columns) -> (B, C, 2 rows, 2 columns)."""
    x = tokens.unflatten(1, grid).unflatten(3, (-1, PATCH, PATCH))  # B, rows, columns, C, 2, 2
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(text: int, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """FLUX's rotary positions: (T, 3) zeros for text, (S, 3) of (0, row, column) for image tokens."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.zeros(text, 3, dtype=image.dtype, device=device), image
