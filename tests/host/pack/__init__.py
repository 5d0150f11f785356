"""A node pack for tests, linked into the host beside FastUSP: conditioning without a text encoder, and a sampler and a
scheduler, registered as other packs do."""

import time

import comfy.k_diffusion.sampling
import comfy.model_detection
import comfy.samplers
import comfy.supported_models
import torch
from comfy.controlnet import ControlBase

from . import changed, quick
from .patched_fp8 import PatchedFP8


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
            },
            "optional": {"pooled": ("INT", {"default": 768})},
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed, tokens, width, guidance, pooled=768):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        y = torch.randn(1, pooled, generator=generator)
        return ([[context, {"pooled_output": y, "guidance": guidance}]],)


class SeededLatent:
    """A latent that is not empty, for img2img and masks."""

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {
            "width": ("INT", {"default": 64}),
            "height": ("INT", {"default": 64}),
            "batch": ("INT", {"default": 1}),
        }
        switches = {"masked": ("BOOLEAN", {"default": False}), "framed": ("BOOLEAN", {"default": False})}
        flux2 = {"flux2": ("BOOLEAN", {"default": False})}
        return {"required": {"seed": ("INT", {"default": 0}), **sizes, **switches}, "optional": flux2}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed, width, height, batch, masked, framed, flux2=False):
        generator = torch.Generator().manual_seed(seed)
        channels, edge = (128, 16) if flux2 else (16, 8)
        latent = {"samples": torch.randn(batch, channels, height // edge, width // edge, generator=generator)}
        if framed:  # as Qwen-Image's VAE gives it
            latent["samples"] = latent["samples"][:, :, None]
        if masked:
            mask = torch.zeros(1, 1, height, width)
            mask[..., : width // 2] = 1
            latent["noise_mask"] = mask
        return (latent,)


class _Control(ControlBase):
    """What a ControlNet gives its model: something to add after each block, another at each timestep."""

    def __init__(self, hidden: int, blocks: int):
        super().__init__()
        self.hidden, self.blocks = hidden, blocks

    def get_control(self, x_noisy, t, cond, batched_number, *_):
        *_, height, width = x_noisy.shape
        generator = torch.Generator().manual_seed(int(1e6 * float(t[0])))
        size = len(x_noisy), -(-height // 2) * -(-width // 2), self.hidden

        def residual():
            return 0.1 * torch.randn(size, generator=generator)

        return {"input": [residual(), None, *(residual() for _ in range(self.blocks))], "output": [residual()]}

    def inference_memory_requirements(self, dtype):
        return 0


class AppliedControl:
    """A prompt with a ControlNet applied."""

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"hidden": ("INT", {"default": 512}), "blocks": ("INT", {"default": 0})}
        return {"required": {"conditioning": ("CONDITIONING",), **sizes}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, conditioning, hidden, blocks):
        control = {"control": _Control(hidden, blocks), "control_apply_to_uncond": False}
        return ([[c, {**extra, **control}] for c, extra in conditioning],)


class _VAE:
    """What a ControlNet asks of a VAE: colours of 8 x 8 pixels, mixed into 16 channels."""

    def __init__(self, framed: bool):
        self.framed = framed

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        mixing = torch.randn(16, 3, generator=torch.Generator().manual_seed(9))
        colours = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        latent = torch.einsum("oc,bchw->bohw", mixing, colours.to("cpu", torch.float32))
        return latent[:, :, None] if self.framed else latent  # framed: as Qwen-Image's gives it


class SmallVAE:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"framed": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, framed):
        return (_VAE(framed),)


class InpaintConditioning:
    """A prompt with the image, and the mask, that InpaintModelConditioning and InstructPixToPixConditioning give it."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"conditioning": ("CONDITIONING",), "latent": ("LATENT",)},
            "optional": {"mask": ("MASK",)},
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, conditioning, latent, mask=None):
        more = {"concat_latent_image": latent["samples"]}
        if mask is not None:
            more["concat_mask"] = mask.reshape(1, 1, *mask.shape[-2:])
        return ([[c, {**extra, **more}] for c, extra in conditioning],)


class MaskedConditioning:
    """A prompt whose tokens are weighted in attention, as StyleModelApply's attn_bias does it; or with a mask that has
    no effect, as FLUX.2's text encoders give it; or one that counts these digits' tokens, as Qwen-Image's does, or that
    is added to the attention's scores for the same."""

    @classmethod
    def INPUT_TYPES(cls):
        switches = {name: ("BOOLEAN", {"default": name == "effective"}) for name in ("effective", "added")}
        optional = switches | {"digits": ("STRING", {"default": ""})}
        return {"required": {"conditioning": ("CONDITIONING",)}, "optional": optional}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, conditioning, effective=True, added=False, digits=""):
        weighted = []
        for c, extra in conditioning:
            if digits:
                mask = torch.tensor([[int(digit) for digit in digits]])
                if added:
                    mask = (mask - 1) * torch.finfo(torch.float32).max
                weighted.append([c, {**extra, "attention_mask": mask}])
                continue
            if not effective:
                weighted.append([c, {**extra, "attention_mask": torch.ones(c.shape[:2], dtype=torch.int64)}])
                continue
            tokens = c.shape[1] + 1
            more = {"attention_mask": torch.full((1, tokens, tokens), -0.5), "attention_mask_img_shape": (1, 1)}
            weighted.append([c, {**extra, **more}])
        return (weighted,)


class AfterEveryEvaluation:
    """Waits after each evaluation, while ComfyUI has the turn, or fails there."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "seconds": ("FLOAT", {"default": 0.0}),
                "error": ("STRING", {"default": ""}),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, model, seconds, error):
        def after(arguments):
            time.sleep(seconds)
            if error:
                raise ValueError(error)
            return arguments["denoised"]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(after)
        return (model,)


class ReferenceMethod:
    """How references are placed, also in the ways that no node of ComfyUI's own offers."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "method": ("STRING", {"default": "index"})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    CATEGORY = "test"

    def apply(self, conditioning, method):
        return ([[c, {**extra, "reference_latents_method": method}] for c, extra in conditioning],)


@torch.no_grad()
def sample_test_midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two evaluations a step, the second one half-way."""
    extra_args, ones = extra_args or {}, x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        middle = (sigmas[i] + sigmas[i + 1]) / 2
        denoised = model(x, sigmas[i] * ones, **extra_args)
        half = x + (x - denoised) / sigmas[i] * (middle - sigmas[i])
        slope = (half - model(half, middle * ones, **extra_args)) / middle
        if callback is not None:
            callback({"i": i, "x": x, "denoised": denoised, "sigma": sigmas[i], "sigma_hat": sigmas[i]})
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


def squares(model_sampling, steps):
    return torch.linspace(1, 0, steps + 1) ** 2 * model_sampling.sigma_max


_detect = comfy.model_detection.detect_unet_config


def detect_small(state_dict, key_prefix, *args, **kwargs):
    """ComfyUI takes every Chroma for one of full size: 1.1 GB for the network that gives modulations; and every
    Qwen-Image: 1.4 GB for a block. And it knows Z-Image at one width alone: 3.6 GB with one block."""
    found = _detect(state_dict, key_prefix, *args, **kwargs)
    if found and found.get("image_model") == "chroma":
        shape = state_dict[f"{key_prefix}distilled_guidance_layer.out_proj.weight"].shape
        found["out_dim"], found["hidden_dim"] = shape
        found["hidden_size"], found["num_heads"] = shape[0], shape[0] // 128  # old ComfyUI: those of FLUX.1, too
    if found and found.get("image_model") == "qwen_image":
        found["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // 128
    key, filled = f"{key_prefix}cap_embedder.1.weight", f"{key_prefix}cap_pad_token" in state_dict
    if found and found.get("image_model") == "lumina2" and filled:
        width, context = state_dict[key].shape
        full = state_dict | {key: torch.empty(3840, context, device="meta")}
        found = _detect(full, key_prefix, *args, **kwargs)
        found |= {"dim": width, "n_heads": width // 128, "n_kv_heads": width // 128}
    return found


comfy.model_detection.detect_unet_config = detect_small
if hasattr(comfy.supported_models, "ZImage"):
    comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "pad_tokens_multiple": 32}
comfy.k_diffusion.sampling.sample_test_midpoint = sample_test_midpoint
comfy.samplers.KSampler.SAMPLERS.append("test_midpoint")
comfy.samplers.SCHEDULER_HANDLERS["test_squares"] = comfy.samplers.SchedulerHandler(squares)
comfy.samplers.KSampler.SCHEDULERS.append("test_squares")

NODE_CLASS_MAPPINGS = {
    "TestSeededConditioning": SeededConditioning,
    "TestSeededLatent": SeededLatent,
    "TestAppliedControl": AppliedControl,
    "TestVAE": SmallVAE,
    "TestInpaintConditioning": InpaintConditioning,
    "TestMaskedConditioning": MaskedConditioning,
    "TestAfterEveryEvaluation": AfterEveryEvaluation,
    "TestReferenceMethod": ReferenceMethod,
    "TestPatchedFP8": PatchedFP8,
    **changed.NODES,
    **quick.NODES,
}
