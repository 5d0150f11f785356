"""Weights that travel give the bits of weights that stay: for every family and format, layout, patch and parking."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from formats import write
from pools import GIVEN, PROMPT, SHORT, evaluate, pids, session
from support import SMALL_CHROMA, SMALL_FLUX2, SMALL_QWEN, SMALL_SD3, SMALL_Z_IMAGE, randn, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import read_model
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import NO_PATCHES, Progress, Session, WeightPatches, name_of

pytestmark = pytest.mark.dist

TRAVELLING = ("shared", "host")
LAYOUTS = [Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2), Layout(ulysses=1, ring=1, batch=2)]
FORMATS = "scaled_tensors", "mixed", "gguf_Q8_0"
FAMILIES = "qwen", "flux2", "chroma", "sd3", "z_image"


@pytest.fixture(scope="module")
def pool(shared_pool):
    return shared_pool(2)


@pytest.fixture(scope="module")
def files(dev, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placements")
    write_checkpoint(str(folder / "qwen"), SMALL_QWEN, seed=3)
    write_checkpoint(str(folder / "sd3"), SMALL_SD3, seed=4)
    write_checkpoint(str(folder / "z_image"), SMALL_Z_IMAGE, seed=5)
    write_checkpoint(str(folder / "flux2"), SMALL_FLUX2, seed=4)
    write_checkpoint(str(folder / "chroma"), SMALL_CHROMA, seed=5)
    for name in FORMATS:
        write(name, dev, folder / name)
    return {"flux": dev, **{path.name: path for path in folder.iterdir()}}


def given_to(config):
    """Two images for a family."""
    prompt = config.example_prompt(lambda *shape: randn(*shape, seed=7), text=7, size=(8, 6), batch=2)
    return randn(2, config.channels, 8, 6, seed=8), torch.tensor([0.7, 0.4]), prompt


def outcome(pool, path, layout, patches=NO_PATCHES, **settings) -> torch.Tensor:
    over = Session(pool, spec_of(path), (layout,), Settings(**settings), patches=patches)
    return over.evaluate(*given_to(read_model(str(path)).config), Progress())


def whole(pool, park, path, layout, **settings) -> torch.Tensor:
    """With weights that were parked: those of a mapped file lie otherwise, and may round otherwise."""
    outcome(pool, path, layout, weights="whole", **settings)
    park(pool)
    return outcome(pool, path, layout, weights="whole", **settings)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(pool, park, files, layout):
    expected = whole(pool, park, files["flux"], layout)
    for weights in TRAVELLING:
        for _ in range(3):  # the first blocks of later evaluations were fetched by those before
            assert torch.equal(outcome(pool, files["flux"], layout, weights=weights), expected), weights


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in FORMATS)])
def test_families_and_formats(pool, park, files, name):
    """Formats are in the test of patches, too."""
    expected = whole(pool, park, files[name], LAYOUTS[0])
    for weights in TRAVELLING:
        for _ in range(2):
            assert torch.equal(outcome(pool, files[name], LAYOUTS[0], weights=weights), expected), weights


def test_products_in_fp8(pool, park, files):
    expected = whole(pool, park, files["flux"], LAYOUTS[0], linear="fp8")
    for weights in TRAVELLING:
        assert torch.equal(outcome(pool, files["flux"], LAYOUTS[0], weights=weights, linear="fp8"), expected), weights


def test_controlnets(pool, park, files):
    """Their residuals come between the blocks."""
    x, timestep, prompt = given_to(read_model(str(files["flux"])).config)
    residual = randn(2, 12, 512, seed=9)
    control = {"input": [residual, None], "output": [None, residual]}

    def controlled(weights):
        over = Session(pool, spec_of(files["flux"]), (LAYOUTS[0],), Settings(weights=weights))
        return over.evaluate(x, timestep, prompt, Progress(), control)

    plain = whole(pool, park, files["flux"], LAYOUTS[0])
    expected = controlled("whole")
    assert not torch.equal(expected, plain)
    assert all(torch.equal(controlled(weights), expected) for weights in TRAVELLING)


def test_blocks_left_out(pool, park, files):
    """Their weights come in their turn, or the next block would not find its own."""
    x, timestep, prompt = given_to(read_model(str(files["sd3"])).config)

    def evaluated(weights, *skipped):
        over = Session(pool, spec_of(files["sd3"]), (LAYOUTS[0],), Settings(weights=weights))
        return over.evaluate(x, timestep, prompt, Progress(), None, skipped)

    whole(pool, park, files["sd3"], LAYOUTS[0])
    expected = {skipped: evaluated("whole", *skipped) for skipped in ((1,), (0,), (2,), (0, 1), ())}
    for weights in TRAVELLING:
        for skipped, whole_gives in expected.items():
            assert torch.equal(evaluated(weights, *skipped), whole_gives), (weights, skipped)


def lora(key: str, shape: tuple[int, int], seed: int) -> WeightPatches:
    up, down = randn(shape[0], 4, seed=seed) * 0.05, randn(4, shape[1], seed=seed + 1)
    patch = WeightPatch(kind="lora", tensors={"up": name_of(up), "down": name_of(down)}, strength=0.8, alpha=4.0)
    return WeightPatches({key: (patch,)}, {name_of(up): up, name_of(down): down})


@pytest.mark.parametrize(
    "name",
    ["mixed", "gguf_Q8_0", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("flux", "scaled_tensors"))],
)
def test_patches_and_their_undoing(pool, park, files, name):
    """A mixed file has layers in all formats of safetensors, and plain ones."""
    one = lora("double_blocks.1.img_mlp.0.weight", (1024, 512), 21)
    other = lora("single_blocks.0.linear2.weight", (512, 1536), 23)
    both = WeightPatches(one.weights | other.weights, one.tensors | other.tensors)
    path, turns = files[name], (both, one, NO_PATCHES, other)
    whole(pool, park, path, LAYOUTS[0])
    expected = [outcome(pool, path, LAYOUTS[0], patches, weights="whole") for patches in turns]
    assert not torch.equal(expected[0], expected[2])
    for weights in TRAVELLING:
        for patches, right in zip(turns, expected, strict=True):
            assert torch.equal(outcome(pool, path, LAYOUTS[0], patches, weights=weights), right), weights


@pytest.mark.parametrize("weights", TRAVELLING)
def test_they_are_parked_and_come_back(pool, files, weights):
    patches = lora("single_blocks.1.linear1.weight", (2560, 512), 25)
    before, alive = outcome(pool, files["flux"], LAYOUTS[0], patches, weights=weights), pids(pool)
    pool.park()
    assert pool.held.state == "parked"
    assert torch.equal(outcome(pool, files["flux"], LAYOUTS[0], patches, weights=weights), before)
    pool.release()
    assert torch.equal(outcome(pool, files["flux"], LAYOUTS[0], patches, weights=weights), before)
    assert pids(pool) == alive
    pool.release()


@pytest.mark.parametrize("weights", TRAVELLING)
def test_what_is_told(pool, dev, weights):
    """The size that was planned is the one that the workers have."""
    phases = []
    over = session(pool, dev, weights=weights)
    over.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(phase=phases.append))
    planned = place_file(read_model(str(dev)).header, over.spec, 2)
    told = pool.status()
    assert told["weights"] == str(planned) and f"loaded: {planned}" in phases
    assert told["weights"].startswith("0 of 4 blocks stay, 4 ")
    assert 0 <= planned.device_bytes - told["nbytes"] < 1 << 20  # alignment
    assert told["nbytes"] < place_file(read_model(str(dev)).header, session(pool, dev).spec, 2).device_bytes


def test_sampling(pool, park, dev):
    def sampled(weights):
        return session(pool, dev, weights=weights).sample(GIVEN.x, SHORT, sampler="heun", positive=PROMPT)

    sampled("whole")
    park(pool)
    expected = sampled("whole")
    assert all(torch.equal(sampled(weights), expected) for weights in TRAVELLING)


def test_one_rank_streams_from_host_memory_and_cannot_share(shared_pool, dev):
    alone = shared_pool(1)
    evaluate(alone, dev)
    alone.park()
    expected = evaluate(alone, dev)
    assert torch.equal(evaluate(alone, dev, weights="host"), expected)
    with pytest.raises(RequestError, match="Set weights to host or auto: .* there is only one"):
        evaluate(alone, dev, weights="shared")
    alone.release()


@pytest.mark.parametrize("weights", TRAVELLING)
def test_a_refused_request_for_another_file_harms_none_that_is_parked(pool, files, weights):
    """Both are described by then; one has no such layout."""
    before, alive = outcome(pool, files["flux"], LAYOUTS[0], weights=weights), pids(pool)
    pool.park()
    with pytest.raises(RequestError):
        outcome(pool, files["qwen"], Layout(ulysses=1, ring=1), weights=weights)
    assert torch.equal(outcome(pool, files["flux"], LAYOUTS[0], weights=weights), before)
    assert pids(pool) == alive


@pytest.mark.parametrize("weights", TRAVELLING)
def test_a_patch_of_a_file_that_was_written_to_is_refused(pool, dev, tmp_path, weights):
    path = tmp_path / "model.safetensors"
    shutil.copy(dev, path)
    first, second = (lora("single_blocks.0.linear2.weight", (512, 1536), seed) for seed in (31, 33))
    over = Session(pool, spec_of(path), (LAYOUTS[0],), Settings(weights=weights), patches=first)
    given = given_to(read_model(str(path)).config)
    over.evaluate(*given, Progress())
    alive = pids(pool)
    os.utime(path, ns=(1, 1))
    with pytest.raises(RequestError, match="was changed since it was loaded"):
        replace(over, patches=second).evaluate(*given, Progress())
    assert pids(pool) == alive
    again = Session(pool, spec_of(path), (LAYOUTS[0],), Settings(weights=weights), patches=second)
    assert again.evaluate(*given, Progress()).isfinite().all() and pids(pool) == alive
