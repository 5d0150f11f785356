"""Workers stay warm through everything that a client does to them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pools import GIVEN, LONG, PROMPT, SHORT, TENSORS, Stopwatch, evaluate, pids, sample, session, submit
from support import SMALL, inputs, randn, relative_difference, spec_of, wait_until

from fastusp_backend.config import Layout, Settings
from fastusp_backend.errors import Cancelled, FastUSPError, ProtocolError, RequestError
from fastusp_backend.pool import Progress
from fastusp_backend.pool import request as requests
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import Evaluate, Sample, Step

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool(shared_pool):
    return shared_pool(2)


@pytest.fixture
def still_right(pool, dev, request):
    """After the test: the same processes as before it, with the right answers."""
    expected = request.getfixturevalue("expected")
    evaluate(pool, dev)
    before = pids(pool)
    yield
    assert relative_difference(evaluate(pool, dev), expected) < 2e-5
    assert pids(pool) == before


@pytest.fixture(scope="module")
def expected(shared_pool, dev):
    return evaluate(shared_pool(1), dev)


def test_model_layout_and_settings_restart_nothing(pool, dev, schnell, expected, still_right):
    starts = pool.starts
    first = sample(pool, dev)
    other = sample(pool, schnell)
    assert relative_difference(other, first) > 0.01
    assert relative_difference(evaluate(pool, dev, Layout(ulysses=1, ring=2)), expected) < 2e-5
    assert relative_difference(evaluate(pool, dev, attention="math"), expected) < 2e-5
    assert torch.equal(sample(pool, dev), first)
    assert torch.equal(sample(pool, schnell), other)
    assert pool.starts == starts
    assert pool.status()["state"] == "idle" and pool.status()["ranks"] == 2


def test_phases_and_states_are_told(pool, dev, still_right):
    phases, states = [], []
    pool.release()
    sample(pool, dev, progress=Progress(phase=phases.append, step=lambda *_: states.append(pool.status()["state"])))
    assert phases == ["loading the model"] and states == ["busy"] * 3
    sample(pool, dev, progress=Progress(phase=phases.append))
    assert len(phases) == 1
    assert all(0 < rank["weights"] < rank["own"] < rank["total"] for rank in pool.status()["memory"])

    def took(rank: int) -> int:
        return sum(f"[rank {rank}]" in line and " took " in line for line in pool.log_since(0)[0])

    wait_until(lambda: took(0) == took(1) > 0, 20)  # which may write behind the answer
    following = pool.log_since(0)[1]
    assert following > 0 and pool.log_since(following) == ([], following)


def test_a_run_of_several_requests_is_busy_between_them(pool, dev, still_right):
    """Its weights may leave then: no request runs."""
    with pool.sampling():
        evaluate(pool, dev)
        assert pool.status()["state"] == "busy" and not pool.busy
        pool.release()
        evaluate(pool, dev)
    assert pool.status()["state"] == "idle"


def test_release_drops_the_model_alone(pool, dev, still_right):
    pool.release()
    pool.release()
    phases = []
    sample(pool, dev, progress=Progress(phase=phases.append))
    assert phases == ["loading the model"]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancel_in_mid_run(pool, dev, still_right, after):
    steps = []
    with pytest.raises(Cancelled):
        sample(pool, dev, LONG, Progress(step=lambda *_: steps.append(1), interrupted=lambda: len(steps) >= after))
    # What was under way when the cancel was sent is not shown.
    assert len(steps) == after


def test_a_cancel_takes_effect_within_two_evaluations(pool, dev, still_right, monkeypatch):
    """Evaluations are made slow here, so that the step that is shown is the one that the workers have just done."""
    slow = inputs(SMALL, text=301, size=(64, 48))
    prompt = Prompt(slow.context, slow.y, slow.guidance)
    link, evaluated = pool._workers._link, []
    heard = link._heard

    def recording(message):
        if isinstance(message, Step):
            evaluated.append(message.index)
        heard(message)

    def step(event, tensors):
        if event.index == 2:
            raise Interrupted

    monkeypatch.setattr(link, "_heard", recording)
    with pytest.raises(Interrupted):
        session(pool, dev).sample(slow.x, LONG, sampler="euler", positive=prompt, progress=Progress(step=step))
    assert evaluated in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4])


class Interrupted(BaseException):
    """As ComfyUI's own: no Exception."""


ERRORS = [Interrupted("now"), ValueError("theirs"), OSError("disk full"), EOFError("theirs"), FastUSPError("theirs")]


@pytest.mark.parametrize("where", ["step", "phase", "interrupted"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_callers_exceptions_cancel_and_come_through(pool, dev, still_right, error, where):
    def fail(*_):
        raise error

    if where == "phase":
        pool.release()
    watch = Stopwatch()
    with pytest.raises(type(error)) as raised:
        sample(pool, dev, LONG, Progress(**{where: fail}))
    assert raised.value is error
    assert watch.seconds < 10


@dataclass(frozen=True)
class Wrong:
    """A request that cannot be served, and what its refusal says."""

    says: str
    drop: str = ""
    layout: Layout = Layout(ulysses=2, ring=1)
    settings: Settings = Settings()
    file: str = "right"


WRONG = {
    "tensors": Wrong("lacks tensor 'x'", drop="x"),
    "layout": Wrong("ulysses 1 x ring 1 does not fit a pool of 2 ranks", layout=Layout(ulysses=1, ring=1)),
    "attention": Wrong("'cudnn' does not exist", settings=Settings(attention="cudnn")),
    "missing file": Wrong("there is no model file", file="missing"),
    "truncated file": Wrong("truncated", file="truncated"),
}
"""One of each place that refuses; `test_requests` has what each of them finds wrong."""


def spec_for(kind: str, dev: Path, directory: Path):
    if kind == "right":
        return spec_of(dev)
    path = directory / "model.safetensors"
    data = dev.read_bytes()
    path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data)
    spec = spec_of(path)
    if kind == "missing":
        path.unlink()
    return spec


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_refused_request_harms_nothing(pool, dev, tmp_path, still_right, wrong):
    tensors = {"sigmas": SHORT, **TENSORS}
    tensors.pop(wrong.drop, None)

    def request(number: int) -> Sample:
        return Sample(
            id=number,
            model=spec_for(wrong.file, dev, tmp_path),
            layout=wrong.layout,
            settings=wrong.settings,
            sampler="euler",
            options={},
            timestep_scale=1.0,
            cfg=1.0,
        )

    with pytest.raises(RequestError, match=wrong.says) as error:
        submit(pool, request, tensors)
    assert pool.status()["error"] == str(error.value)


def test_a_degree_that_the_heads_forbid_is_refused(shared_pool, dev):
    three = shared_pool(3)
    with pytest.raises(RequestError, match="Ulysses degree of 3 does not divide the model's 4 attention heads"):
        evaluate(three, dev, Layout(ulysses=3, ring=1))
    before = pids(three)
    evaluate(three, dev, Layout(ulysses=1, ring=3))
    assert pids(three) == before


def test_tensors_are_kept_reused_and_forgotten(pool, dev, expected, still_right):
    what = {"model": spec_of(dev), "layout": Layout(ulysses=1, ring=2), "settings": Settings()}
    step, prompt = {"x": GIVEN.x, "timestep": GIVEN.timestep}, PROMPT.tensors()
    numbers = {"context": 1001, "y": 1002, "guidance": 1003}

    def run(tensors, **changes):
        return submit(pool, lambda number: Evaluate(id=number, **what, **changes), tensors)["output"]

    kept = run(step | prompt, keep=numbers)
    assert relative_difference(kept, expected) < 2e-5
    assert torch.equal(run(step, reuse=numbers), kept)
    # Another context under the name, the kept ones for the rest.
    other = {"context": randn(1, 9, SMALL.context, seed=40)}
    rest = {name: number for name, number in numbers.items() if name != "context"}
    changed = run(step | other, keep={"context": 1004}, reuse=rest)
    assert torch.equal(changed, run(step | prompt | other))
    assert torch.equal(run(step, reuse=numbers), kept)
    with pytest.raises(RequestError, match="'context' should have been kept as 1001"):
        run(step, reuse=numbers, forget=[1001, 1004])
    with pytest.raises(RequestError, match="lacks tensor 'context'"):
        run(step | {"y": GIVEN.y}, reuse={"guidance": 1003})
    with pytest.raises(RequestError, match="timestep"):
        run({"x": GIVEN.x, "timestep": torch.ones(3), **prompt})
    pool.release()
    with pytest.raises(RequestError, match="should have been kept"):
        run(step, reuse=numbers)


def test_a_session_goes_on_after_a_refusal(pool, dev, expected, still_right, tmp_path):
    """What a refused request was to keep is sent again."""
    fresh = Prompt(GIVEN.context + 0, GIVEN.y * 2, GIVEN.guidance)
    pool.release()
    wrong = replace(session(pool, dev), model=spec_for("missing", dev, tmp_path))
    with pytest.raises(RequestError):
        wrong.evaluate(GIVEN.x, GIVEN.timestep, fresh, Progress())
    first = session(pool, dev).evaluate(GIVEN.x, GIVEN.timestep, fresh, Progress())
    assert torch.equal(session(pool, dev).evaluate(GIVEN.x, GIVEN.timestep, fresh, Progress()), first)
    assert relative_difference(first, expected) > 1e-3


def test_threads_take_turns(pool, dev, still_right):
    alone = sample(pool, dev)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: sample(pool, dev), range(8)))
    assert all(torch.equal(result, alone) for result in results)


def test_a_malformed_frame_of_the_client_is_refused(pool, dev, still_right):
    pool._workers.channel.send_bytes(b"FU\x00\x00 no message at all")
    with pytest.raises(ProtocolError, match="refused a message"):
        sample(pool, dev)


def test_a_malformed_frame_beside_an_order(pool, dev, still_right):
    """The weights go, though that is not seen, and with them what the workers keep of a prompt."""
    evaluate(pool, dev)
    pool._workers.channel.send_bytes(b"no message at all")
    with pytest.raises(ProtocolError, match="refused a message"):
        pool.release()


def test_ctrl_c_while_a_request_is_being_cancelled(pool, dev, still_right, monkeypatch):
    """The workers may not have been told: the next prompt does."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(requests, "cancel", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample(pool, dev, LONG, Progress(step=interrupt))
    watch, phases = Stopwatch(), []
    sample(pool, dev, progress=Progress(phase=phases.append))
    assert phases[0] == "waiting for the workers" and watch.seconds < 20
