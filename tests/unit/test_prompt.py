"""Prompts and masks as they travel: by name, and back."""

from dataclasses import fields

import pytest
import torch

from fastusp_backend.errors import RequestError
from fastusp_backend.prompt import Inpainting, Prompt, is_prompt_tensor

pytestmark = pytest.mark.unit

X = torch.zeros(2, 16, 4, 6)


def full_prompt() -> Prompt:
    given = {"context": torch.rand(2, 5, 8), "y": torch.rand(2, 3), "guidance": torch.rand(2), "concat": X + 1}
    return Prompt(**given, references=(X + 2, X[..., :2] + 3), reference_method="index")


def test_a_prompt_arrives_as_it_was_sent():
    prompt = full_prompt()
    tensors = prompt.tensors()
    assert all(is_prompt_tensor(name) for name in tensors)
    arrived = Prompt.from_tensors({f"positive.{name}": t for name, t in tensors.items()}, "index", "positive.")
    for field in fields(Prompt):
        one, other = getattr(prompt, field.name), getattr(arrived, field.name)
        assert one is other or all(a is b for a, b in zip(one, other, strict=True)), field.name


def test_what_is_absent_stays_absent():
    prompt = Prompt.from_tensors({"context": torch.rand(1, 2, 3), "x": X}, None)
    assert prompt.tensors().keys() == {"context"} and not is_prompt_tensor("x")


def test_a_prompt_without_text_is_refused():
    with pytest.raises(RequestError, match="lacks tensor 'negative.context'"):
        Prompt.from_tensors(full_prompt().tensors(), None, "negative.")


@pytest.mark.parametrize("guidance", [1, 2])
def test_some_images_of_a_batch(guidance):
    prompt = Prompt(torch.rand(2, 5, 8), torch.rand(2, 3), torch.rand(guidance), X, (X,), "index")
    second = prompt.of_images(slice(1, 2))
    assert second.reference_method == "index" and len(second.guidance) == 1
    assert second.guidance[0] == prompt.guidance[-1]
    for name, tensor in second.tensors().items():
        assert len(tensor) == 1, name
        assert torch.equal(tensor[0], prompt.tensors()[name][-1])


def test_a_mask_is_expanded_to_the_latents():
    sent = Inpainting(mask=torch.ones(1, 1, 4, 6), latent_image=X + 1, noise=X + 2).tensors()
    arrived = Inpainting.from_tensors(sent, X)
    assert arrived.mask.shape == X.shape and torch.equal(arrived.noise, X + 2)
    assert Inpainting.from_tensors({}, X) is None
    with pytest.raises(RequestError, match="'mask' .* does not fit the latents"):
        Inpainting.from_tensors(sent | {"mask": torch.ones(3)}, X)
    del sent["inpaint_noise"]
    with pytest.raises(RequestError, match="lacks tensor 'inpaint_noise'"):
        Inpainting.from_tensors(sent, X)
