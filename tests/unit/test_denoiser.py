"""What an evaluation keeps and asks for: buffers by shape, memory before it begins, a word before each evaluation."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import SMALL_Z_IMAGE, OneRank, inputs, randn, relative_difference

from fastusp_backend.config import Layout
from fastusp_backend.engine import denoiser as denoisers
from fastusp_backend.engine.denoiser import CACHED_EVALUATIONS, NO_IMAGES, WORKING_SET, Denoiser
from fastusp_backend.engine.first_block import KEPT
from fastusp_backend.models.synthetic import TINY_FLUX, random_state
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

HIDDEN = TINY_FLUX.hidden


@pytest.fixture
def one_rank():
    return OneRank(TINY_FLUX.build())


def evaluate(one_rank: OneRank, rows: int) -> torch.Tensor:
    """Of an image of 2 x `rows` latents."""
    given = inputs(TINY_FLUX, text=2, size=(2, rows))
    return one_rank(given.x, given.timestep, Prompt(given.context, given.y, given.guidance))


@pytest.mark.parametrize("config, tokens, filled", [(TINY_FLUX, 4, 4), (SMALL_Z_IMAGE, 7, 16)])
def test_a_rank_embeds_no_more_of_a_text_than_it_must(config, tokens, filled):
    """The second half of seven tokens; all of them where they see each other, and half of what fills them up."""
    one_rank, given = OneRank(config.build()), []

    def embed(context):
        given.append(context)
        return torch.nn.functional.pad(context, (0, 0, 0, config.filled(context.shape[1]) - context.shape[1]))

    one_rank.model.embed_text = embed
    one_rank._mesh = SimpleNamespace(layout=Layout(ulysses=2, ring=1), sequence_position=1)
    context = randn(1, 7, config.context, seed=0)
    mine = one_rank._embedded(context)
    assert torch.equal(given[0], context[:, -tokens:]) and mine.shape[1] == filled


def test_the_shape_that_was_used_longest_ago_makes_room(one_rank):
    first, *others = range(2, 2 * CACHED_EVALUATIONS + 2, 2)
    for rows in (first, *others, first, 20):
        evaluate(one_rank, rows)
    assert [shape.x[-1] for shape in one_rank.evaluations] == [*others[1:], first, 20]


def test_evaluations_go_when_addresses_have_moved(one_rank, monkeypatch):
    """Their graphs would replay into memory that is another's: where a larger shape had it allocated anew, and where
    somebody else had."""
    transport = one_rank._transport = SimpleNamespace(generation=one_rank._generation)

    def make(*arguments):
        transport.generation += "large" in arguments
        return object()

    monkeypatch.setattr(denoisers, "Evaluation", make)
    assert one_rank._evaluation("small") is one_rank._evaluation("small")
    one_rank._evaluation("large")
    assert [*one_rank._evaluations] == ["large"]
    transport.generation += 1
    one_rank._evaluation("small")
    assert [*one_rank._evaluations] == ["small"]


@pytest.mark.parametrize("batch, size, text, references", [(1, (4, 6), 3, 0), (3, (4, 6), 3, 0), (2, (8, 5), 5, 8)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_tried_for_every_image_and_token(one_rank, monkeypatch, batch, size, text, references, ranks):
    given = inputs(TINY_FLUX, text=text, size=size, batch=batch)
    images = (randn(batch, 16, 4, 8, seed=1),) if references else ()
    prompt = Prompt(given.context, given.y, given.guidance, references=images)
    one_rank._mesh = replace(one_rank._mesh, layout=Layout(ulysses=ranks, ring=1))
    asked, make = [], torch.empty
    monkeypatch.setattr(denoisers.torch, "empty", lambda *shape, **more: (asked.append(shape), make(0, **more))[1])
    one_rank.probe_memory(given.x, [prompt])
    one_rank.probe_memory(given.x, [prompt], spare=8000)
    monkeypatch.undo()
    patches = -(-size[0] // 2) * -(-size[1] // 2) + references
    local = -(-text // ranks) + -(-patches // ranks)
    count = WORKING_SET * batch * local * HIDDEN
    assert (count,) in asked and (count + 2000,) in asked


def test_memory_of_the_modulations_is_allocated_while_an_evaluations_is_tried(one_rank, monkeypatch):
    given, made, make = inputs(TINY_FLUX, text=2, size=(2, 2), batch=3), {}, torch.empty
    prompt, width = Prompt(given.context, given.y, given.guidance), one_rank.model.modulation_width
    rows, working_set = 5 * 3 * width, WORKING_SET * 3 * (2 + 1) * HIDDEN
    there = []

    def empty(count, **more):
        if count == working_set:
            there.append(made[rows]() is not None)
        tensor = make(0, **more)
        made[count] = weakref.ref(tensor)
        return tensor

    monkeypatch.setattr(denoisers.torch, "empty", empty)
    one_rank.probe_memory(given.x, [prompt], evaluations=5)
    assert there == [True] and made[rows]() is None


@pytest.mark.parametrize("caches", [False, True])
def test_what_a_cache_keeps_of_all_prompts_is_allocated_while_evaluations_are_tried(one_rank, monkeypatch, caches):
    given, kept, there, make = inputs(TINY_FLUX, text=2, size=(2, 2), batch=3), [], [], torch.Tensor.new_empty
    prompts = [Prompt(given.context + n, given.y, given.guidance) for n in range(2)]

    def new_empty(x, shape, **more):
        tensor = make(x, shape, **more)
        kept.append(weakref.ref(tensor))
        assert tuple(shape) == (KEPT, 3, 2 + 1, HIDDEN)
        return tensor

    def tried(*_):
        there.append([one() is not None for one in kept])
        return True

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(one_rank, "_probe_evaluation", tried)
    one_rank.probe_memory(given.x, prompts, caches=caches)
    assert there == ([[True], [True, True]] if caches else [[], []]) and not any(one() is not None for one in kept)


@pytest.mark.parametrize("layer", ["txt_in.weight", "final_layer.adaLN_modulation.1.weight"])
def test_what_was_computed_of_prompts_is_dropped_when_weights_have_changed(one_rank, layer):
    """The text's tokens, and modulations."""
    one_rank.model.load_state_dict(random_state(one_rank.model, seed=0, dtype=torch.float32))
    given, key = inputs(TINY_FLUX, text=2, size=(2, 4)), one_rank.model.module_key(layer)
    prompt = Prompt(given.context, given.y, given.guidance)
    before = one_rank(given.x, given.timestep, prompt)
    one_rank.model.get_parameter(key).data.mul_(2)
    assert torch.equal(one_rank(given.x, given.timestep, prompt), before)
    one_rank.forget_prompts()
    assert relative_difference(one_rank(given.x, given.timestep, prompt), before) > 1e-3


class OneBuffer:
    """Stands for a shape's evaluations that give all their velocities in one buffer, as a CUDA graph does."""

    captured = True

    def __init__(self, calls: list, x: torch.Tensor):
        self.calls, self.buffer = calls, torch.empty_like(x)

    def run(self, x, prompt, *_):
        self.calls.append(prompt)
        return self.buffer.fill_(len(self.calls))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_prompt_has_a_velocity_of_its_own_and_is_asked_for(one_rank, monkeypatch, count):
    """Of prompts of one length, as cond and uncond often are, too; a cancel is heard between any two of them."""
    calls, given = [], inputs(TINY_FLUX, text=2, size=(2, 2))
    monkeypatch.setattr(denoisers, "Evaluation", lambda *_: OneBuffer(calls, given.x))
    prompts = [Prompt(given.context + n, given.y, given.guidance) for n in range(count)]
    velocities = Denoiser.__call__(one_rank, given.x, given.timestep, prompts, lambda: calls.append("ask"))
    assert calls == [word for prompt in prompts for word in ("ask", one_rank._prompts[prompt])]
    assert [v.unique().tolist() for v in velocities] == [[2.0 * n + 2] for n in range(count)]


@pytest.mark.parametrize(
    "groups, position, prompts, images",
    [
        (1, 0, 1, [slice(None)]),
        (1, 0, 2, 2 * [slice(None)]),
        (2, 0, 1, [slice(0, 2)]),
        (2, 1, 1, [slice(2, 4)]),
        (2, 0, 2, [slice(None), NO_IMAGES]),
        (2, 1, 2, [NO_IMAGES, slice(None)]),
        (2, 1, 4, 2 * [NO_IMAGES] + 2 * [slice(None)]),
    ],
)
def test_groups_divide_prompts_or_else_images(one_rank, groups, position, prompts, images):
    layout = Layout(batch=groups, ulysses=1, ring=1)
    one_rank._mesh = replace(one_rank._mesh, layout=layout, batch_position=position)
    given = inputs(TINY_FLUX, text=2, size=(2, 2), batch=4)
    assert one_rank.shares(prompts * [Prompt(given.context, given.y, given.guidance)]) == images
