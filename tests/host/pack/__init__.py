"""A node pack for tests, linked into the host beside FastUSP: conditioning without a text encoder."""

import torch
from comfy.controlnet import ControlBase


class SeededConditioning:
    """A FLUX prompt of random tensors."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "tokens": ("INT", {"default": 24}),
                "width": ("INT", {"default": 4096}),
                "guidance": ("FLOAT", {"default": 3.5}),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed, tokens, width, guidance):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        pooled = torch.randn(1, 768, generator=generator)
        return ([[context, {"pooled_output": pooled, "guidance": guidance}]],)


class SeededLatent:
    """A latent that is not empty, for img2img and masks."""

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {
            "width": ("INT", {"default": 64}),
            "height": ("INT", {"default": 64}),
            "batch": ("INT", {"default": 1}),
        }
        return {"required": {"seed": ("INT", {"default": 0}), **sizes, "masked": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed, width, height, batch, masked):
        generator = torch.Generator().manual_seed(seed)
        latent = {"samples": torch.randn(batch, 16, height // 8, width // 8, generator=generator)}
        if masked:
            mask = torch.zeros(1, 1, height, width)
            mask[..., : width // 2] = 1
            latent["noise_mask"] = mask
        return (latent,)


class _Control(ControlBase):
    """What a ControlNet gives its model: something to add after each block."""

    def get_control(self, x_noisy, t, cond, batched_number, *_):
        return {"input": [torch.zeros(1, 1, 1)], "output": []}

    def inference_memory_requirements(self, dtype):
        return 0


class AppliedControl:
    """A prompt with a ControlNet applied."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, conditioning):
        return ([[c, {**extra, "control": _Control(), "control_apply_to_uncond": False}] for c, extra in conditioning],)


NODE_CLASS_MAPPINGS = {
    "TestSeededConditioning": SeededConditioning,
    "TestSeededLatent": SeededLatent,
    "TestAppliedControl": AppliedControl,
}
