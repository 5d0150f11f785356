"""What stands for the transformer of each family (remote_transformer.py), called as ComfyUI calls its own."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..fastusp_backend.models.detection import FamilyConfig
from ..fastusp_backend.prompt import Prompt
from .comfyui import QwenImageTransformer2DModel
from .host import Unsupported
from .provenance import leaves_out
from .remote_transformer import RemoteTransformer, refuse_unsupported
from .text_masks import hidden_end, masks_nothing
from .weight_patches import PREFIX


class RemoteFlux(RemoteTransformer):
    """FLUX.1 and FLUX.2, of which ComfyUI has one transformer."""

    @classmethod
    def fits(cls, unet_config: dict, config: FamilyConfig) -> bool:
        """Old ComfyUI takes every FLUX for one of hidden size 3072."""
        return unet_config["hidden_size"] == config.hidden

    @property
    def img_in(self) -> SimpleNamespace:
        """ComfyUI reads off its weight's shape whether the model, patched as it is now, takes an image or mask."""
        return SimpleNamespace(weight=torch.empty(self._shapes[f"{PREFIX}img_in.weight"], device="meta"))

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006 - ComfyUI's own signature
        **kwargs,
    ):
        args = x, timestep, context, y, guidance, ref_latents, control, transformer_options
        return self._through_wrappers(transformer_options, *args, **kwargs)

    def _evaluate(
        self,
        x,
        timestep,
        context,
        y,
        guidance,
        ref_latents,
        control,
        transformer_options,
        attention_mask=None,
        ref_latents_method=None,
        **kwargs,
    ):
        if attention_mask is not None and not masks_nothing(attention_mask):
            raise Unsupported(
                "a prompt with an attention mask (Apply Style Model with attn_bias)",
                "Set strength_type to multiply in Apply Style Model",
            )
        refuse_unsupported(transformer_options, kwargs, self.stock)
        own = self._config.channels  # ComfyUI has put the image and mask of Fill, Canny, Depth behind them
        concat = x[:, own:] if x.shape[1] > own else None
        prompt = Prompt(context, y, guidance, concat, tuple(ref_latents or ()), ref_latents_method)
        counts = {"input": self._config.double_blocks, "output": self._config.single_blocks}
        return self._on_workers(x[:, :own], timestep, prompt, control, **counts)


class RemoteChroma(RemoteFlux):
    """Its wrappers see no pooled text and no references, which have no effect in ComfyUI."""

    def forward(
        self,
        x,
        timestep,
        context,
        guidance=None,
        control=None,
        transformer_options={},  # noqa: B006 - ComfyUI's own signature
        **kwargs,
    ):
        args = x, timestep, context, guidance, control, transformer_options
        return self._through_wrappers(transformer_options, *args, **kwargs)

    def _evaluate(
        self, x, timestep, context, guidance, control, transformer_options, *, y=None, ref_latents=None, **kwargs
    ):
        args = x, timestep, context, y, guidance, ref_latents, control, transformer_options
        return super()._evaluate(*args, **kwargs)


class RemoteQwenImage(RemoteTransformer):
    _POSITIONS = inspect.signature(QwenImageTransformer2DModel.forward).parameters
    """The order of arguments differs between versions of ComfyUI; it calls by name, wrappers are called by position."""
    _ORDER = tuple(name for name, p in _POSITIONS.items() if name != "self" and p.kind is not p.VAR_KEYWORD)

    def shown(self, mask: torch.Tensor, tokens: int) -> list[int] | None:
        """A token that no other sees counts no more than one that is not there: its output is not used, and the others'
        positions are the same."""
        if masks_nothing(mask):
            return super().shown(mask, tokens)
        return hidden_end(mask) if mask.shape[-1] == tokens else None

    def process_img(self, *args, **kwargs):
        """What a ControlNet calls that computes with weights of the model itself."""
        raise Unsupported(
            "a ControlNet that needs the model's own weights (Qwen-Image Fun)",
            "Use an InstantX ControlNet, or load the model with Load Diffusion Model",
        )

    def forward(self, *args, **kwargs):
        given = dict(zip(self._ORDER, args, strict=False)) | kwargs
        positions = [given.pop(name, {} if name == "transformer_options" else None) for name in self._ORDER]
        return self._through_wrappers(positions[self._ORDER.index("transformer_options")], *positions, **given)

    def _evaluate(self, *args, **kwargs):
        return self._evaluate_named(**dict(zip(self._ORDER, args, strict=True)), **kwargs)

    def _evaluate_named(
        self,
        x,
        timestep,
        context,
        transformer_options,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        control=None,
        ref_latents_method=None,
        **kwargs,
    ):
        shown = [context.shape[1]] if attention_mask is None else self.shown(attention_mask, context.shape[1])
        if shown is None:
            raise Unsupported("a prompt with an attention mask that hides more than the end of a text")
        if additional_t_cond is not None:
            raise Unsupported("the timestep condition of Qwen-Image-Layered (additional_t_cond)")
        refuse_unsupported(transformer_options, kwargs, self.stock)
        prompt = Prompt(context, references=tuple(ref_latents or ()), reference_method=ref_latents_method)
        blocks = {"input": self._config.blocks}
        if len(set(shown)) == 1:
            prompt = replace(prompt, context=context[:, : shown[0]])
            return self._on_workers(x, timestep, prompt, control, **blocks)
        parts = []
        for number, length in enumerate(shown):  # ComfyUI joins what is of one length with its hidden tokens
            one = slice(number, number + 1)
            own = prompt.of_images(one)
            own = replace(own, context=own.context[:, :length])
            residuals = {kind: [t if t is None else t[one] for t in given] for kind, given in (control or {}).items()}
            parts.append(self._on_workers(x[one], timestep[one], own, residuals, **blocks))
        return torch.cat(parts)


class RemoteSD3(RemoteTransformer):
    """Stable Diffusion 3, around whose transformer ComfyUI runs no wrappers."""

    @classmethod
    def fits(cls, unet_config: dict, config: FamilyConfig) -> bool:
        """ComfyUI tells it by its sizes alone, and takes it to have as many blocks as heads."""
        return unet_config.get("depth") == config.blocks and "pos_embed_max_size" in unet_config

    @property
    def y_embedder(self):
        """What Stability's ControlNets copy the weights of, or `x_embedder`'s."""
        raise Unsupported(
            "a ControlNet that needs the model's own weights (Stability's for 3.5 large)",
            "Use one of diffusers' kind (InstantX), or load the model with Load Diffusion Model",
        )

    x_embedder = y_embedder

    def left_out(self, transformer_options: dict) -> list[int]:
        """Those that ComfyUI's Skip Layer Guidance replaces by nothing."""
        return [number for number, by in self._replaced(transformer_options).items() if leaves_out(by)]

    def _replaced(self, transformer_options: dict) -> dict:
        """Number of a block -> what runs in its place."""
        given = transformer_options.get("patches_replace", {}).get("dit", {})
        blocks = [("double_block", number) for number in range(self._config.blocks)]
        return {key[1]: given[key] for key in blocks if key in given}

    def forward(
        self,
        x,
        timesteps,
        context=None,
        y=None,
        control=None,
        transformer_options={},  # noqa: B006 - ComfyUI's own signature
        **kwargs,
    ):
        self._note_arrival(transformer_options)
        skipped = self.left_out(transformer_options)
        others = [number for number in self._replaced(transformer_options) if number not in skipped]
        replaced = transformer_options.get("patches_replace", {}) | {"dit": others}
        refuse_unsupported(transformer_options | {"patches_replace": replaced}, kwargs, self.stock)
        blocks = self._config.blocks
        return self._on_workers(x, timesteps, Prompt(context, y), control, skipped=skipped, output=blocks)


class RemoteZImage(RemoteTransformer):
    ignored = frozenset(("num_tokens", "clip_text_pooled", "attention_mask"))

    @classmethod
    def fits(cls, unet_config: dict, config: FamilyConfig) -> bool:
        """ComfyUI knows Lumina 2 by the same name, and a Z-Image of one width, with two refiners a stream."""
        filled = unet_config.get("pad_tokens_multiple") == config.multiple
        return filled and unet_config["dim"] == config.hidden and config.image_blocks == config.context_refiners == 2

    def forward(self, x, timesteps, context, num_tokens=None, attention_mask=None, **kwargs):
        args = x, timesteps, context, num_tokens, attention_mask
        return self._through_wrappers(kwargs.get("transformer_options", {}), *args, **kwargs)

    def _evaluate(
        self,
        x,
        timesteps,
        context,
        num_tokens,
        attention_mask=None,
        ref_latents=None,
        ref_contexts=None,
        siglip_feats=None,
        transformer_options={},  # noqa: B006 - ComfyUI's own signature
        clip_text_pooled=None,
        **kwargs,
    ):
        if ref_latents or ref_contexts or siglip_feats:
            raise Unsupported("a prompt with images (Z-Image Omni)", "Remove the images from the prompt")
        refuse_unsupported(transformer_options, kwargs, self.stock)
        return self._on_workers(x, timesteps, Prompt(context), None)


TRANSFORMERS: dict[str, tuple[str | None, type[RemoteTransformer]]] = {
    "FLUX.1": ("flux", RemoteFlux),
    "FLUX.2": ("flux2", RemoteFlux),
    "Chroma": ("chroma", RemoteChroma),
    "Qwen-Image": ("qwen_image", RemoteQwenImage),
    "Stable Diffusion 3": (None, RemoteSD3),
    "Z-Image": ("lumina2", RemoteZImage),
}
"""Family -> the name that ComfyUI's detection gives it, if any, and what stands for its transformer."""
