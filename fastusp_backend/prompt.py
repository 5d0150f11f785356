"""What an image is sampled from, beside its noise: a prompt's tensors, and a mask.

The one declaration of both: the host makes them, `protocol` carries their tensors by name, ranks make them anew and
hand them to samplers and models. A new conditioning is a field here, and what a model makes of it.

Shapes: B batch, C latent channels, h w latent height and width, T text tokens, E text width, V pooled text's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from .errors import RequestError

Tensors = dict[str, torch.Tensor]
_REFERENCE = "reference."
"""In front of the numbers of a prompt's references."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Conditioning as tensors. Prompts are compared by identity: what is computed from one is kept as long as it lives.

    context: the text, (B, T, E).
    y: pooled text, (B, V).
    guidance: embedded guidance, (B,) or (1,).
    concat: input channels behind the latents' own, (B, C', h, w).
    references: latents (B, C, h', w') of any sizes, whose tokens follow the image's.
    reference_method: how references are placed, of `models.positions.METHODS`; None is the model's own way.

    Latents may have a frame axis of one.
    """

    context: torch.Tensor
    y: torch.Tensor | None = None
    guidance: torch.Tensor | None = None
    concat: torch.Tensor | None = None
    references: tuple[torch.Tensor, ...] = ()
    reference_method: str | None = None

    def tensors(self) -> Tensors:
        """All tensors that there are, by name."""
        named = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"{_REFERENCE}{n}": latent for n, latent in enumerate(self.references)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], reference_method: str | None, prefix="") -> "Prompt":
        """The inverse of `tensors`, whose names follow `prefix`; other names are left alone. Raises RequestError where
        the context is missing."""
        references = []
        while (name := f"{prefix}{_REFERENCE}{len(references)}") in tensors:
            references.append(tensors[name])
        given = {name: tensors.get(prefix + name) for name in _TENSORS} | {"context": take(tensors, prefix + "context")}
        return cls(**given, references=tuple(references), reference_method=reference_method)

    def of_images(self, images: slice) -> "Prompt":
        """The prompt of some images of the batch."""
        each = {name: getattr(self, name) for name in _TENSORS}
        each = {name: t if t is None or name == "guidance" and len(t) == 1 else t[images] for name, t in each.items()}
        return replace(self, **each, references=tuple(latent[images] for latent in self.references))


_TENSORS = tuple(field.name for field in fields(Prompt) if not field.name.startswith("reference"))


def is_prompt_tensor(name: str) -> bool:
    """Whether a name is one that `Prompt.tensors` gives."""
    return name in _TENSORS or name.startswith(_REFERENCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inpainting:
    """What a mask keeps of an image. All have the latents' shape, or one that broadcasts to it.

    mask: 1 where the image is sampled, 0 where `latent_image` is kept.
    latent_image: the latents of what is kept.
    noise: what the kept part is noised with.
    """

    mask: torch.Tensor
    latent_image: torch.Tensor
    noise: torch.Tensor

    def tensors(self) -> Tensors:
        return {tensor: getattr(self, field) for field, tensor in _INPAINTING.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> "Inpainting | None":
        """The inverse of `tensors`, expanded to latents x; None where there is no mask. Raises RequestError where a
        tensor is missing or does not fit x."""
        if _INPAINTING["mask"] not in tensors:
            return None
        return cls(**{field: _expanded(take(tensors, name), name, x) for field, name in _INPAINTING.items()})


_INPAINTING = {"mask": "mask", "latent_image": "latent_image", "noise": "inpaint_noise"}


def take(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A request's tensor. Raises RequestError where it is missing."""
    if name not in tensors:
        raise RequestError(f"the request lacks tensor {name!r}")
    return tensors[name]


def _expanded(tensor: torch.Tensor, name: str, x: torch.Tensor) -> torch.Tensor:
    try:
        return tensor.expand(x.shape)
    except RuntimeError as error:
        raise RequestError(
            f"tensor {name!r} {tuple(tensor.shape)} does not fit the latents {tuple(x.shape)}"
        ) from error
