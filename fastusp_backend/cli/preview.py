"""A picture of latents without a VAE."""

import torch
from PIL import Image


def latent_picture(latents: torch.Tensor, *, scale: int = 8) -> Image.Image:
    """Shows latents (C, h, w) as RGB: their three principal components, stretched to the full range and enlarged
    `scale` times.

    It shows structure, not colours; ComfyUI's own previews know the model's colours.
    """
    channels, height, width = latents.shape
    pixels = latents.float().flatten(1).T
    pixels = pixels - pixels.mean(0)
    _, _, directions = torch.linalg.svd(pixels, full_matrices=False)
    components = pixels @ directions[:3].T
    low, high = components.amin(0), components.amax(0)
    rgb = ((components - low) / (high - low).clamp_min(1e-8) * 255).round().to(torch.uint8)
    image = Image.fromarray(rgb.view(height, width, 3).numpy())
    return image.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
