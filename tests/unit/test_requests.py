"""What a request asks for is checked before anything runs, and a refusal says what is wrong."""

import pytest
import torch
from support import SMALL, SOME_FILE, OneRank, inputs, randn

from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.errors import LayoutError, RequestError
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Evaluate, Sample
from fastusp_backend.worker.requests import check_layout, evaluation_inputs, sampling_inputs

pytestmark = pytest.mark.unit

GIVEN = inputs(SMALL, text=7, size=(8, 6))
PROMPT = Prompt(GIVEN.context, GIVEN.y, GIVEN.guidance).tensors()
TENSORS = {"x": GIVEN.x, "sigmas": torch.linspace(1, 0, 4), **{f"positive.{name}": t for name, t in PROMPT.items()}}
WHAT = {
    "id": 1,
    "model": ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32"),
    "layout": Layout(ulysses=2, ring=1),
    "settings": Settings(),
}


def sample(sampler="euler", options=None, **more) -> Sample:
    return Sample(**WHAT, sampler=sampler, options=options or {}, timestep_scale=1000.0, cfg=1.0, **more)


@pytest.fixture(scope="module")
def one_rank():
    torch.manual_seed(0)
    return OneRank(SMALL.build())


def test_what_a_sampling_loop_starts_from():
    negative = {"negative.context": GIVEN.context * 2, "negative.reference.0": GIVEN.x}
    mask = {"mask": torch.ones(1, 1, 8, 6), "latent_image": GIVEN.x, "inpaint_noise": GIVEN.x * 2}
    request = sample("lcm", reference_methods={"negative": "index"})
    got = sampling_inputs(request, TENSORS | negative | mask | {"noise": randn(2, *GIVEN.x.shape, seed=0)})
    assert got.x is GIVEN.x and got.noise.shape == (2, *GIVEN.x.shape)
    assert got.positive.y is GIVEN.y and got.positive.reference_method is None
    assert got.negative.references == (GIVEN.x,) and got.negative.reference_method == "index"
    assert got.prompts == [got.positive, got.negative]
    assert got.inpainting.mask.shape == GIVEN.x.shape
    sigmas = torch.linspace(1, 0, 4)
    assert got.timesteps == (sigmas[:-1] * 1000).tolist()


def test_without_a_negative_prompt_and_a_mask():
    got = sampling_inputs(sample(), TENSORS)
    assert got.prompts == [got.positive] and got.inpainting is None and len(got.noise) == 0


@pytest.mark.parametrize(
    "differs, alike",
    [
        ({}, True),
        ({"negative.context": GIVEN.context[:, :5]}, False),
        ({"negative.guidance": None}, False),
        ({"negative.reference.0": GIVEN.x}, False),
        ({"negative.context": None}, False),
    ],
    ids=["other values", "another length", "without guidance", "a reference", "no negative prompt"],
)
def test_prompts_that_comfyui_evaluates_in_one_go(differs, alike):
    negative = {f"negative.{name}": 2 * tensor for name, tensor in PROMPT.items()} | differs
    if negative["negative.context"] is None:
        negative = {}
    tensors = TENSORS | {name: tensor for name, tensor in negative.items() if tensor is not None}
    assert sampling_inputs(sample(), tensors).alike == alike


WRONG = {
    "sampler": ("sampler 'euler_x' is not one of: euler,", sample("euler_x"), {}),
    "option": ("sampler 'euler' has no option eta", sample(options={"eta": 1.0}), {}),
    "context width": (
        "choose the text encoders of FLUX.1, those of DualCLIPLoader",
        sample(),
        {"positive.context": randn(1, 7, 65, seed=0)},
    ),
    "context batch": (r"expected \(1, T, 64\)", sample(), {"positive.context": randn(2, 7, 64, seed=0)}),
    "context rank": ("the prompt's tensor", sample(), {"positive.context": randn(64, seed=0)}),
    "no text": ("the prompt's tensor", sample(), {"positive.context": torch.zeros(1, 0, 64)}),
    "no context": ("lacks tensor 'positive.context'", sample(), {"positive.context": None}),
    "channels": ("do not fit the model", sample(), {"x": randn(1, 4, 8, 6, seed=0)}),
    "latent rank": ("do not fit the model", sample(), {"x": torch.tensor(1.0)}),
    "no latents": ("do not fit the model", sample(), {"x": torch.zeros(1, 16, 0, 6)}),
    "no x": ("lacks tensor 'x'", sample(), {"x": None}),
    "pooled width": ("the pooled text", sample(), {"positive.y": randn(1, 31, seed=0)}),
    "pooled rank": ("the pooled text", sample(), {"positive.y": randn(32, seed=0)}),
    "guidance": ("the guidance", sample(), {"positive.guidance": torch.ones(3)}),
    "negative": ("the prompt's tensor", sample(), {"negative.context": randn(1, 7, 65, seed=0)}),
    "sigmas": ("are no list of levels", sample(), {"sigmas": torch.tensor(1.0)}),
    "no sigma": ("are no list of levels", sample(), {"sigmas": torch.ones(0)}),
    "no sigmas": ("lacks tensor 'sigmas'", sample(), {"sigmas": None}),
    "no noise": ("lcm takes 2 draws of noise", sample("lcm"), {}),
    "noise shape": ("lcm takes 2 draws", sample("lcm"), {"noise": randn(2, 1, 16, 8, 5, seed=0)}),
    "noise rank": ("lcm takes 2 draws", sample("lcm"), {"noise": torch.tensor(2.0)}),
    "mask alone": ("lacks tensor 'latent_image'", sample(), {"mask": torch.ones(1, 1, 8, 6)}),
    "mask shape": ("'mask' .* does not fit", sample(), {"mask": torch.ones(1, 1, 8, 5)}),
}


@pytest.mark.parametrize("says, request_, tensors", WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused(one_rank, says, request_, tensors):
    given = {name: t for name, t in (TENSORS | tensors).items() if t is not None}
    with pytest.raises(RequestError, match=says):
        got = sampling_inputs(request_, given)
        one_rank.check(got.x, got.prompts)


def test_the_right_request_is_not(one_rank):
    got = sampling_inputs(sample(), TENSORS)
    one_rank.check(got.x, got.prompts)


def test_what_an_evaluation_starts_from():
    residuals = {"control.0": randn(1, 12, 512, seed=0), "control.1": randn(1, 12, 512, seed=1)}
    request = Evaluate(**WHAT, control={"input": [0, None, 1], "output": [1]})
    x, timestep, control = evaluation_inputs(request, {"x": GIVEN.x, "timestep": GIVEN.timestep, **residuals})
    assert x is GIVEN.x and torch.equal(timestep, GIVEN.timestep)
    assert control.tensors == tuple(residuals.values())
    assert (control.input, control.output) == ((0, None, 1), (1,))
    for missing in ("x", "timestep", "control.1"):
        given = {"x": GIVEN.x, "timestep": GIVEN.timestep, **residuals}
        del given[missing]
        with pytest.raises(RequestError, match=f"lacks tensor '{missing}'"):
            evaluation_inputs(request, given)
    with pytest.raises(RequestError, match="timestep .* does not fit the latents: expected 1 values"):
        evaluation_inputs(request, {"x": GIVEN.x, "timestep": torch.ones(3), **residuals})


@pytest.mark.parametrize(
    "layout, says",
    [
        (Layout(ulysses=1, ring=1), "ulysses 1 x ring 1 does not fit a pool of 2 ranks"),
        (Layout(ulysses=2, ring=2), "does not fit a pool of 2 ranks"),
        (Layout(ulysses=2, ring=1), "Ulysses degree of 2 does not divide the model's 5 attention heads"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, says):
    request = Evaluate(**WHAT | {"layout": layout})
    with pytest.raises(LayoutError, match=says):
        check_layout(request, 2, 5)
    check_layout(Evaluate(**WHAT), 2, 4)
