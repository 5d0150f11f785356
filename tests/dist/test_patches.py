"""Weight patches change the weights in place, travel once, and leave no trace."""

import shutil
from dataclasses import replace

import msgspec
import pytest
import torch
import torch.nn.functional as F
from formats import LIMITS, write
from pools import GIVEN, LONG, PROMPT, SHORT, evaluate, pids, session, submit
from safetensors.torch import load_file, save_file
from support import REORDERED, randn, relative_difference, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.errors import Cancelled, PatchesLost, RequestError
from fastusp_backend.pool import NO_PATCHES, Progress, WeightPatches, name_of
from fastusp_backend.pool import session as sessions
from fastusp_backend.protocol import Evaluate, Patch

pytestmark = pytest.mark.dist

BOUND = 2e-5
QKV, MLP, TXT = "double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight", "txt_in.weight"
SHAPES = {QKV: (1536, 512), MLP: (2560, 512), TXT: (512, 64)}
NORM = "double_blocks.0.img_attn.norm.query_norm.weight"
"""As newer files name it; the tests' say `scale`."""

Lora = tuple[WeightPatch, torch.Tensor, torch.Tensor]


def lora(key: str, seed: int, strength: float = 1.0, rank: int = 4) -> Lora:
    out, width = SHAPES[key]
    up, down = randn(out, rank, seed=seed) * 0.05, randn(rank, width, seed=seed + 1)
    roles = {"up": name_of(up), "down": name_of(down)}
    return WeightPatch(kind="lora", tensors=roles, strength=strength, alpha=float(rank)), up, down


def stronger(given: Lora, strength: float) -> Lora:
    patch, up, down = given
    values = {name: getattr(patch, name) for name in patch.__struct_fields__} | {"strength": strength}
    return WeightPatch(**values), up, down


def stack(given: dict[str, list[Lora]]) -> WeightPatches:
    tensors = {name_of(t): t for parts in given.values() for _, *pair in parts for t in pair}
    return WeightPatches({key: tuple(patch for patch, *_ in parts) for key, parts in given.items()}, tensors)


def patched(pool, model, patches: WeightPatches, **progress) -> torch.Tensor:
    run = replace(session(pool, model), patches=patches)
    return run.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(**progress))


def looped(pool, model, patches: WeightPatches) -> torch.Tensor:
    run = replace(session(pool, model), patches=patches)
    return run.sample(GIVEN.x, SHORT, sampler="euler", positive=PROMPT)


@pytest.fixture(scope="module")
def pool(shared_pool):
    return shared_pool(2)


@pytest.fixture
def messages(pool, monkeypatch):
    """The Patch messages that go to the workers: weights and number of tensors."""
    seen, send = [], sessions.submit

    def record(workers, message, tensors, *more):
        if isinstance(message, Patch) and workers is pool._workers:
            seen.append(({key: len(patches) for key, patches in message.weights.items()}, len(tensors)))
        return send(workers, message, tensors, *more)

    monkeypatch.setattr(sessions, "submit", record)
    return seen


@pytest.fixture
def merged(shared_pool, dev, tmp_path):
    """merged(given): what a file with the LoRAs merged into it gives: (an evaluation, a run of the loop)."""

    def run(given: dict[str, list[Lora]]) -> tuple[torch.Tensor, torch.Tensor]:
        state = load_file(dev)
        for key, parts in given.items():
            for patch, up, down in parts:
                state[key] = state[key] + patch.strength * (up @ down)
        path = tmp_path / "merged.safetensors"
        save_file(state, path)
        return evaluate(shared_pool(1), path), looped(shared_pool(1), path, NO_PATCHES)

    return run


def test_patches_are_those_of_a_merged_file_and_leave_no_trace(pool, dev, merged):
    """In both paths, with the prompt's tensors kept by the workers; one set is large enough to be mapped by them."""
    content, plain, plain_loop = dev.read_bytes(), evaluate(pool, dev), looped(pool, dev, NO_PATCHES)
    processes = pids(pool)
    first, large = lora(QKV, 1), lora(MLP, 3, rank=2048)
    for given in (
        {QKV: [first], TXT: [lora(TXT, 5)]},
        {QKV: [first, lora(QKV, 7, 0.3)], MLP: [stronger(large, 0.02)]},
        {QKV: [stronger(first, -0.6)], MLP: [stronger(large, 0.02)]},
    ):
        patches, (want, want_loop) = stack(given), merged(given)
        got = patched(pool, dev, patches)
        assert relative_difference(got, want) < BOUND < 1e-3 < relative_difference(got, plain)
        assert relative_difference(looped(pool, dev, patches), want_loop) < BOUND
    assert torch.equal(evaluate(pool, dev), plain)
    assert torch.equal(looped(pool, dev, NO_PATCHES), plain_loop)
    assert dev.read_bytes() == content  # CPU ranks map the file
    assert pids(pool) == processes


def test_what_changes_travels_once(pool, dev, messages):
    qkv, mlp = lora(QKV, 1), lora(MLP, 3, 0.1)
    both = stack({QKV: [qkv], MLP: [mlp]})
    first = patched(pool, dev, both)
    looped(pool, dev, both)
    patched(pool, dev, stack({QKV: [qkv], MLP: [mlp]}))
    assert messages == [({QKV: 1, MLP: 1}, 4)]
    patched(pool, dev, stack({QKV: [qkv], MLP: [stronger(mlp, 0.2)]}))
    patched(pool, dev, stack({QKV: [qkv, lora(QKV, 5)], MLP: [stronger(mlp, 0.2)]}))
    patched(pool, dev, stack({QKV: [qkv]}))
    evaluate(pool, dev)
    evaluate(pool, dev)
    assert messages[1:] == [({MLP: 1}, 2), ({QKV: 2}, 4), ({QKV: 1, MLP: 0}, 2), ({QKV: 0}, 0)]
    assert torch.equal(patched(pool, dev, both), first)


def test_models_alternate_on_one_pool(pool, dev, schnell, messages):
    evaluate(pool, schnell)
    one, two = stack({QKV: [lora(QKV, 1)]}), stack({TXT: [lora(TXT, 3)]})
    wants = [patched(pool, dev, one), patched(pool, dev, two), evaluate(pool, schnell)]
    assert not torch.equal(wants[0], wants[1])
    for _ in range(2):
        got = [patched(pool, dev, one), patched(pool, dev, two), evaluate(pool, schnell)]
        assert all(torch.equal(*pair) for pair in zip(got, wants, strict=True))
    assert [list(weights) for weights, _ in messages] == [[QKV], [TXT, QKV]] * 3


def test_workers_that_lost_their_patches_get_them_again(pool, dev, messages):
    patches = stack({QKV: [lora(QKV, 1)]})
    plain, want = evaluate(pool, dev), patched(pool, dev, patches)
    pool.release()
    assert torch.equal(patched(pool, dev, patches), want)
    what = {"model": spec_of(dev), "layout": Layout(ulysses=2, ring=1), "settings": Settings()}
    for number, expected in ((10**6, NO_PATCHES), (10**6 + 1, patches)):  # behind the client's back
        submit(pool, lambda n, number=number: Patch(id=n, model=spec_of(dev), number=number, base=None, weights={}))
        with pytest.raises(PatchesLost, match="hold patch set 1000"):
            submit(pool, lambda n: Evaluate(id=n, patches=5, **what))
        assert torch.equal(patched(pool, dev, expected), want if expected is patches else plain)


def test_parked_weights_keep_their_patches(pool, park, dev, messages):
    one, two = stack({QKV: [lora(QKV, 1)]}), stack({TXT: [lora(TXT, 3)]})
    evaluate(pool, dev)
    park(pool)
    plain, *wants = evaluate(pool, dev), patched(pool, dev, two), patched(pool, dev, one)
    pool.park()
    assert pool.held.state == "parked"
    sent = len(messages)
    assert torch.equal(patched(pool, dev, one), wants[1]) and len(messages) == sent
    for patches, want in ((two, wants[0]), (NO_PATCHES, plain)):  # sent while the weights are parked
        pool.park()
        assert torch.equal(patched(pool, dev, patches), want) and pool.held.state == "resident"


def test_a_cancel_while_patching(pool, dev):
    patches = stack({QKV: [lora(QKV, 1)], MLP: [lora(MLP, 3, 0.1)]})
    plain, want = evaluate(pool, dev), patched(pool, dev, patches)
    evaluate(pool, dev)
    phases = []
    progress = Progress(phase=phases.append, interrupted=lambda: bool(phases))
    with pytest.raises(Cancelled):  # of a long run: a busy machine may have done an evaluation before it is asked
        replace(session(pool, dev), patches=patches).sample(
            GIVEN.x, LONG, sampler="euler", positive=PROMPT, progress=progress
        )
    assert phases[0] == "patching 2 weights"
    assert torch.equal(evaluate(pool, dev), plain)
    assert torch.equal(patched(pool, dev, patches), want)


def test_newer_names_of_a_weight_are_the_same_weight(pool, dev):
    value = randn(128, seed=9)
    values = [
        patched(
            pool,
            dev,
            WeightPatches(
                {key: (WeightPatch(kind="set", tensors={"value": name_of(value)}, strength=1.0),)},
                {name_of(value): value},
            ),
        )
        for key in (NORM, NORM.replace("weight", "scale"))
    ]
    assert torch.equal(*values) and not torch.equal(values[0], evaluate(pool, dev))


def test_what_does_not_fit_is_refused_and_changes_nothing(pool, dev):
    plain, good = evaluate(pool, dev), lora(QKV, 1)
    for key, words in (("img_in.weight", "does not fit a weight of shape"), ("foo.weight", "no weight 'foo.weight'")):
        with pytest.raises(RequestError, match=words):
            patched(pool, dev, stack({QKV: [good], key: [good]}))
        assert torch.equal(evaluate(pool, dev), plain)


def test_a_file_that_was_replaced_still_restores_its_weights(pool, dev, schnell, tmp_path):
    """It is open, until another model is loaded."""
    path = tmp_path / "model.safetensors"
    shutil.copy(dev, path)
    old, plain = session(pool, path), evaluate(pool, path)
    replace(old, patches=stack({QKV: [lora(QKV, 1)]})).evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress())
    shutil.copy(schnell, tmp_path / "other")
    (tmp_path / "other").rename(path)
    assert torch.equal(old.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress()), plain)
    evaluate(pool, path)
    with pytest.raises(RequestError, match="was replaced since this workflow loaded it"):
        old.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress())


def test_a_scaled_fp8_file(pool, dev, tmp_path):
    """Against a float32 file of the values that the patched weight is rounded to, and the others have."""
    path, plain = tmp_path / "fp8.safetensors", tmp_path / "values.safetensors"
    values, given = write("scaled_metadata", dev, path), lora(QKV, 1)
    unpatched = evaluate(pool, path)
    patched_value = values[QKV] + given[1] @ given[2]
    scale = patched_value.abs().max() / LIMITS[torch.float8_e4m3fn]
    save_file(values | {QKV: (patched_value / scale).to(torch.float8_e4m3fn).float() * scale}, plain)
    got = patched(pool, path, stack({QKV: [given]}))
    assert relative_difference(got, evaluate(pool, plain)) < BOUND < 1e-3 < relative_difference(got, unpatched)
    assert torch.equal(evaluate(pool, path), unpatched)


def test_a_widened_input(pool, shared_pool, park, dev, schnell, tmp_path):
    """Against a file with that input; parked, with another model meanwhile, at another strength, without a trace."""
    key, state, path = "img_in.weight", load_file(dev), tmp_path / "canny.safetensors"
    up, down, image = randn(512, 4, seed=1), randn(4, 128, seed=2), randn(*GIVEN.x.shape, seed=3)
    prompt = replace(PROMPT, concat=image)
    wide = WeightPatch(
        kind="lora", tensors={"up": name_of(up), "down": name_of(down)}, strength=1.0, reshape=(512, 128)
    )

    def both(pool, model, patches) -> list[torch.Tensor]:
        run = replace(session(pool, model), patches=patches)
        return [
            run.evaluate(GIVEN.x, GIVEN.timestep, prompt, Progress()),
            run.sample(GIVEN.x, SHORT, sampler="euler", positive=prompt),
        ]

    both(pool, dev, WeightPatches({key: (wide,)}, {name_of(t): t for t in (up, down)}))
    plain = evaluate(pool, dev)  # where `img_in` lies as it always does after it was widened
    for strength, more in ((1.0, {}), (-0.4, {QKV: [lora(QKV, 7)]})):
        changed = {key: F.pad(state[key], (0, 64)) + strength * (up @ down)}
        changed |= {name: state[name] + a @ b for name, parts in more.items() for _, a, b in parts}
        save_file(state | changed, path)
        others = stack(more)
        patch = msgspec.structs.replace(wide, strength=strength)
        patches = WeightPatches({key: (patch,), **others.weights}, {name_of(t): t for t in (up, down)} | others.tensors)
        park(pool)
        got, want = both(pool, dev, patches), both(shared_pool(1), path, NO_PATCHES)
        assert all(relative_difference(*pair) < BOUND for pair in zip(got, want, strict=True))
        park(pool)
        assert all(map(torch.equal, both(pool, dev, patches), got))
        with pytest.raises(RequestError, match="takes 16 channels of an image or mask beside the latents; got none"):
            patched(pool, dev, patches)
    evaluate(pool, schnell)  # which puts mapped weights in the place of those that were parked
    assert all(relative_difference(*pair) < REORDERED for pair in zip(both(pool, dev, patches), got, strict=True))
    with pytest.raises(RequestError, match="it takes latents alone"):
        both(pool, dev, NO_PATCHES)
    assert torch.equal(evaluate(pool, dev), plain)
    assert relative_difference(plain, evaluate(shared_pool(1), dev)) < BOUND
    with pytest.raises(RequestError, match="'txt_in.weight' cannot be widened from .512, 64. to .512, 128."):
        patched(pool, dev, WeightPatches({TXT: (wide,)}, {name_of(t): t for t in (up, down)}))
    assert torch.equal(evaluate(pool, dev), plain)


def test_a_packed_file(pool, park, dev, tmp_path):
    """Against a float32 file of the packed values with the LoRAs merged into them; parked and fetched meanwhile."""
    path, plain = tmp_path / "packed.gguf", tmp_path / "values.safetensors"
    values, qkv, mlp = write("gguf_Q8_0", dev, path), lora(QKV, 1), lora(MLP, 3, 0.5)
    evaluate(pool, path)
    park(pool)
    unpatched = evaluate(pool, path)
    for given in ({QKV: [qkv]}, {QKV: [stronger(qkv, -0.6), lora(QKV, 7)], MLP: [mlp]}):
        merged = {key: sum((p.strength * (up @ down) for p, up, down in g), values[key]) for key, g in given.items()}
        save_file(values | merged, plain)
        want = evaluate(pool, plain)
        got = patched(pool, path, stack(given))
        assert relative_difference(got, want) < BOUND < 1e-3 < relative_difference(got, unpatched)
        park(pool)
        assert torch.equal(patched(pool, path, stack(given)), got)
        assert relative_difference(looped(pool, path, stack(given)), looped(pool, plain, NO_PATCHES)) < BOUND
    assert torch.equal(evaluate(pool, path), unpatched)
