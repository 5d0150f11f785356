"""Weights that are unpacked once, as they are read: the same values as those that layers unpack at each use, with and
without patches."""

import gc
from dataclasses import replace

import msgspec
import pytest
import torch
from fake_pool import pool  # noqa: F401
from fake_workers import SPEC, X, rank, script
from formats import MINI, write
from patched import LORA, QKV, TENSORS, everything
from support import SMALL_CHROMA, inputs, randn, spec_of

from fastusp_backend.config import Layout, Settings, WeightPatch
from fastusp_backend.engine import Engine, engine
from fastusp_backend.engine.checkpoint import Checkpoint
from fastusp_backend.engine.patching import PatchedWeights
from fastusp_backend.engine.room import Room, kept_free
from fastusp_backend.errors import OutOfRoom, PatchesLost
from fastusp_backend.models.files import model_and_plans, read_model, unpacked_plans
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.pool import Progress, Session
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Evaluate, Held, Park, Release

pytestmark = pytest.mark.unit

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SMALL = [
    "fp8_e4m3fn",
    "fp8_e5m2",
    "scaled_old",
    "scaled_metadata_e5m2",
    "mixed",
    "int8_convrot",
    "gguf_Q8_0",
    "gguf_Q4_K",
]
PATCHES = {f"{QKV}.weight": (LORA, LORA), "img_in.weight": ()}
WIDER = WeightPatch(kind="lora", tensors={"up": "u", "down": "d"}, strength=0.7, reshape=(256, 128))
WIDE = TENSORS | {"u": randn(256, 2, seed=8), "d": randn(2, 128, seed=9)}


@pytest.fixture(scope="module", params=SMALL)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(str(folder / "plain"), MINI, seed=1)
    write(request.param, folder / "plain", folder / "model")
    return folder / "model"


def spec_to(path, *, unpack):
    types = {"storage": "bfloat16", "compute": "bfloat16", "keep_quantised": True, "unpack": unpack}
    return msgspec.structs.replace(spec_of(path), **types)


def room_for_some(path):
    """For half of what unpacking all takes."""
    spec = spec_to(path, unpack=True)
    model, plans = model_and_plans(read_model(str(path)).header, spec)
    forms = [of.values() for of in (plans, unpacked_plans(model, plans, spec))]
    return sum(plan.nbytes for of in forms for plan in of) // 2 + max(kept_free(MINI, of, 1).usual for of in forms)


def loaded(path, *, unpack, room=1 << 40):
    checkpoint = Checkpoint(spec_to(path, unpack=unpack))
    placement = checkpoint.settle(Room(False, room))
    if room == 1 << 40:
        assert placement.unpacked == unpack and ("unpacked" in str(placement)) == unpack
    else:
        assert 0 < placement.unpacked < 1 and " % of the weights unpacked, " in str(placement)
    checkpoint.allocate(CPU)
    checkpoint.read()
    return checkpoint


def assert_same_values(wide: Checkpoint, small: Checkpoint) -> int:
    """As layers compute with them. Returns how many were unpacked."""
    count = 0
    for name, plan in wide.plans.items():
        stored, as_file = wide.stored(name), small.stored(name)
        if plan.small is not None:
            assert stored.scale is None and stored.data.dtype == BF16 and stored.low_rank is None
            assert as_file.data.dtype != BF16
            count += 1
        assert torch.equal(stored.values(BF16), as_file.values(BF16)), name
    return count


def test_what_a_layer_would_unpack_at_each_use(path):
    wide, small = (loaded(path, unpack=unpack) for unpack in (True, False))
    assert assert_same_values(wide, small) >= 8
    for layer in wide.model.modulations():  # used once a prompt
        name = next(name for name, module in wide.model.named_modules() if module is layer)
        assert wide.plans[f"{name}.weight"].small is None


def test_a_network_that_gives_modulations_is_used_once_a_prompt(tmp_path):
    write_checkpoint(str(tmp_path / "plain"), SMALL_CHROMA)
    write("fp8_e4m3fn", tmp_path / "plain", tmp_path / "model")
    plans = loaded(tmp_path / "model", unpack=True).plans
    unpacked = {name for name, plan in plans.items() if plan.small is not None}
    assert "double_blocks.0.img.mlp.2.weight" in unpacked
    assert not any(name.startswith("distilled_guidance_layer.") for name in unpacked)


def test_patches_change_the_files_form(path):
    """And leave no trace; addresses stay."""
    assert not check_patches(path, loaded(path, unpack=True)), "graphs need not be captured again"


def test_patches_where_some_are_unpacked(path):
    check_patches(path, loaded(path, unpack=True, room=room_for_some(path)))


def check_patches(path, wide):
    """Returns how often graphs had to be captured again."""
    small = loaded(path, unpack=False)
    name = wide.model.module_key(f"{QKV}.weight")
    before, unpatched = everything(wide), wide.stored(name).values(BF16).clone()
    moved = []
    of_wide, of_small = PatchedWeights(wide, lambda: moved.append(1)), PatchedWeights(small)
    for weights in (of_wide, of_small):
        assert weights.change(PATCHES, TENSORS, base=0, number=1) == (0, 1)
    assert_same_values(wide, small)
    assert not torch.equal(wide.stored(name).values(BF16), unpatched)
    for weights in (of_wide, of_small):
        weights.change({f"{QKV}.weight": (LORA,)}, TENSORS, base=1, number=2)
    assert_same_values(wide, small)
    assert of_wide.change({}, {}, base=None, number=0) == (1, 0)
    after = everything(wide)
    assert all(after[key][0] == place and torch.equal(after[key][1], data) for key, (place, data) in before.items())
    return len(moved)


@pytest.mark.parametrize("path", ["fp8_e4m3fn"], indirect=True)
def test_a_weight_that_is_widened(path):
    wide, small = (loaded(path, unpack=unpack) for unpack in (True, False))
    before = wide.stored("img_in.weight").data.clone()
    for checkpoint in (wide, small):
        weights = PatchedWeights(checkpoint)
        weights.change({"img_in.weight": (WIDER,)}, WIDE, base=0, number=1)
        assert checkpoint.stored("img_in.weight").data.shape == (256, 128)
    assert_same_values(wide, small)
    assert before.shape == (256, 64)


def test_an_engine_gives_the_same_bits(path, monkeypatch):
    """Of weights that are all unpacked, none of which are, and some."""
    given = inputs(MINI, text=3, size=(4, 4))
    outs, sizes = [], []
    for unpack, room in ((True, 1 << 40), (False, 1 << 40), (True, room_for_some(path))):
        monkeypatch.setattr(engine, "measure_room", lambda device, room=room: Room(False, room))
        own = Engine(CPU)
        own.describe(spec_to(path, unpack=unpack))
        own.make_room()
        own.load()
        sizes.append(own.nbytes)
        assert own.unpacked == unpack and ("% of the weights unpacked" in own.placement) == (len(sizes) == 3)
        # What was unpacked is read anew for who forbids it; what was not need not be.
        assert own.is_resident(spec_to(path, unpack=True)) and own.is_resident(spec_to(path, unpack=False)) != unpack
        denoiser = own.denoiser(Layout(ulysses=1, ring=1), Settings())
        prompt = Prompt(given.context.to(BF16), given.y.to(BF16), given.guidance)
        outs.append(denoiser(given.x.to(BF16), given.timestep, [prompt], lambda: None)[0])
        own.release()
        gc.collect()
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert sizes[1] < sizes[2] < sizes[0]


def session(pool, **settings):  # noqa: F811
    model = msgspec.structs.replace(SPEC, keep_quantised=True)
    return Session(pool, model, (Layout(ulysses=1, ring=1),), Settings(**settings))


def ask(own):
    return own.evaluate(X, torch.ones(1), Prompt(randn(1, 2, 4, seed=0), torch.ones(1, 4)), Progress())


def held(pool, had, own=None):  # noqa: F811
    """The workers say what they have."""
    spec, state = (own or session(pool)).spec, "none" if had == "nothing" else "resident"
    told = Held(id=1, model=spec, state=state, nbytes=9, transport="", weights="", unpacked=had == "unpacked")
    pool._workers._hear(told)


@pytest.mark.parametrize("had", ["unpacked", "as in the file", "nothing"])
def test_a_request_that_lacks_room_is_asked_again_without(pool, had):  # noqa: F811
    """Also where they did not even load."""
    own = session(pool)
    ask(own)
    held(pool, had)
    script("out_of_memory")
    if had == "as in the file":
        with pytest.raises(OutOfRoom):
            ask(own)
        assert not pool.crowded and own.spec.unpack
        return
    ask(own)
    asked = [message.model.unpack for message in rank(pool).sent(Evaluate)]
    assert asked == [True, True, False] and pool.crowded and not own.spec.unpack
    held(pool, "as in the file")
    script("out_of_memory")
    with pytest.raises(OutOfRoom):  # once
        ask(own)


def test_room_that_the_files_form_lacks_too_says_nothing_of_unpacking(pool):  # noqa: F811
    """The file's form stays, and serves what follows: nothing is read, or fails, twice again."""
    own = session(pool)
    ask(own)
    held(pool, "nothing")
    script("out_of_memory", "out_of_memory")
    with pytest.raises(OutOfRoom):
        ask(own)
    assert not pool.crowded and own.spec.unpack
    held(pool, "as in the file")
    before = len(rank(pool).sent(Evaluate))
    script("out_of_memory")
    with pytest.raises(OutOfRoom):
        ask(own)
    assert len(rank(pool).sent(Evaluate)) == before + 1 and not pool.crowded


def test_what_is_lost_on_the_way_is_sent_again_too(pool):  # noqa: F811
    own = session(pool)
    ask(own)
    held(pool, "unpacked")
    script("unpatched", "out_of_memory", "served")
    ask(own)
    held(pool, "unpacked")
    script("unpatched", "unpatched")
    with pytest.raises(PatchesLost):
        ask(own)


def test_the_size_is_known_whichever_session_had_them_loaded(pool):  # noqa: F811
    """Weights that were loaded to be parked stay as the file has them."""
    parks, keeps = session(pool, residency="park"), session(pool)
    ask(parks)
    held(pool, "as in the file", parks)
    assert parks.resident_bytes() == keeps.resident_bytes() == 9
    held(pool, "unpacked", keeps)
    assert parks.resident_bytes() == 9
    parks.evict()
    assert rank(pool).sent(Release) and not rank(pool).sent(Park), "the host's memory would have to take all of them"


def test_weights_that_make_room_for_others_come_back_small(pool):  # noqa: F811
    own = session(pool)
    ask(own)
    held(pool, "as in the file")
    own.make_room()
    assert own.spec.unpack
    held(pool, "unpacked")
    own.evict()
    assert own.spec.unpack, "as the option residency says"
    held(pool, "unpacked")
    own.make_room()
    assert not own.spec.unpack


def test_what_is_parked_or_asked_for_small_is_not_unpacked(pool):  # noqa: F811
    assert not session(pool, residency="park").spec.unpack and session(pool, residency="release").spec.unpack
    own = session(pool)
    assert not replace(own, model=msgspec.structs.replace(own.model, keep_quantised=False)).spec.unpack
