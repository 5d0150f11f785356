"""Ranks on several machines, which are network namespaces of this host: the same results as one machine's, and an end
of all where one of them ends."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import time

import machines
import pytest
import torch
from listening import listeners
from pools import GIVEN, LONG, PROMPT, SHORT, Stopwatch, evaluate, pids, sample, session
from serving import Serving, serving
from support import SMALL, relative_difference, wait_until
from test_patches import QKV, lora, patched, stack
from test_serve_life import LIMIT, Later

from fastusp_backend.config import Layout
from fastusp_backend.errors import PoolError, RequestError
from fastusp_backend.planner import legal_layouts
from fastusp_backend.pool import Progress
from fastusp_backend.prompt import Prompt

PORTS = itertools.count(8189)

pytestmark = pytest.mark.dist


class Cluster:
    """`serve` on each of two machines, with folders of their own."""

    def __init__(self, folder, ranks: int, model):
        self.folder, self.port = folder, next(PORTS)
        self.servers: list[Serving] = []
        for number in (0, 1):
            (folder / f"models-{number}").mkdir(exist_ok=True)
            shutil.copy(model, folder / f"models-{number}" / model.name)
        self._ranks = ranks
        for number in (0, 1):
            self.start(number)

    def start(self, number: int) -> Serving:
        arguments = ["--gpus", f"cpu:{self._ranks}", "--nnodes", "2", "--node-rank", str(number), "--trust-network"]
        arguments += ["--rdzv-endpoint", f"{machines.address(0)}:{self.port}", "--models"]
        arguments += [str(self.folder / f"models-{number}")]
        server = Serving(self.folder, *arguments, listen=None, prefix=machines.inside(number))
        self.servers[number:] = [server, *self.servers[number + 1 :]]
        server.says("The key file is" if number == 0 else "joined")
        return server

    def attach(self):
        return self.servers[0].attach()

    def close(self) -> None:
        for server in reversed(self.servers):
            server.close()


@pytest.fixture(scope="module")
def network():
    with contextlib.ExitStack() as made:
        try:
            made.enter_context(machines.network(2))
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield


def cluster(folder, ranks, model):
    made = Cluster(folder, ranks, model)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def two(network, run_dirs, tmp_path_factory, dev):
    """Two machines of one rank each."""
    yield from cluster(tmp_path_factory.mktemp("two"), 1, dev)


@pytest.fixture(scope="module")
def mortals(network, run_dirs, tmp_path_factory, dev):
    """Likewise, for tests that end their processes."""
    yield from cluster(tmp_path_factory.mktemp("mortals"), 1, dev)


def test_two_machines_of_one_rank(two, shared_pool, dev):
    pool, local, one = two.attach(), shared_pool(2), evaluate(shared_pool(1), dev)
    assert (pool.devices.ranks, pool.devices.per_machine) == (2, 1)
    for layout in (Layout(ulysses=1, ring=2), Layout(ulysses=2, ring=1)):
        got = evaluate(pool, dev, layout)
        assert torch.equal(got, evaluate(local, dev, layout)) and relative_difference(got, one) < 2e-5
    assert torch.equal(sample(pool, dev), sample(local, dev))
    patches = stack({QKV: [lora(QKV, 3)]})
    assert torch.equal(patched(pool, dev, patches), patched(local, dev, patches))
    groups = {"positive": PROMPT, "negative": PROMPT, "cfg": 2.0, "sampler": "euler"}
    run, beside = (session(x, dev, Layout(batch=2, ulysses=1, ring=1)) for x in (pool, local))
    assert torch.equal(run.sample(GIVEN.x, SHORT, **groups), beside.sample(GIVEN.x, SHORT, **groups))
    wait_until(lambda: len(pool.status()["memory"]) == 2 and all(pool.status()["memory"]), 5)
    wait_until(lambda: any(machines.address(1) in line and "[rank 1]" in line for line in pool.log_since(0)[0]), 5)


def test_two_machines_of_two_ranks(network, run_dirs, tmp_path, shared_pool, dev):
    """Ulysses inside a machine, a ring between them, and batch groups."""
    one = evaluate(shared_pool(1), dev)
    (layout, *_) = legal_layouts(4, SMALL.heads, 2)
    assert layout == Layout(ulysses=2, ring=2)
    for made in cluster(tmp_path, 2, dev):
        pool = made.attach()
        assert relative_difference(evaluate(pool, dev, layout), one) < 2e-5
        groups = {"positive": PROMPT, "negative": PROMPT, "cfg": 2.0, "sampler": "euler"}
        run = session(pool, dev, Layout(batch=2, ulysses=2, ring=1))
        beside = session(shared_pool(1), dev).sample(GIVEN.x, SHORT, **groups)
        assert relative_difference(run.sample(GIVEN.x, SHORT, **groups), beside) < 2e-5


def test_large_tensors_reach_the_other_machine(two, dev):
    """Those of a ControlNet, which ranks of one machine map."""
    pool = two.attach()
    residuals = {"input": [torch.randn(1, 12, 512) for _ in range(2)], "output": []}
    run = session(pool, dev, Layout(ulysses=1, ring=2))
    plain = evaluate(pool, dev, Layout(ulysses=1, ring=2))
    got = run.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(), control=residuals)
    large = run.evaluate(GIVEN.x.repeat(64, 1, 1, 1), GIVEN.timestep.repeat(64), _repeated(64), Progress())
    assert relative_difference(got, plain) > 1e-3
    assert relative_difference(large[:1], plain) < 2e-5


def _repeated(times: int) -> Prompt:
    return Prompt(*(t.repeat(times, *[1] * (t.dim() - 1)) for t in (GIVEN.context, GIVEN.y, GIVEN.guidance)))


def test_what_listens(two, dev):
    """The server's port, and gloo's, which take nobody any more, each on its machine's own address."""
    pool = two.attach()
    evaluate(pool, dev)
    for number, rank in enumerate(pids(pool)):
        net = [x for x in listeners(rank) if x.kind != "unix"]
        assert {x.name for x in net} <= {machines.address(number)}, net
        for port in net:
            with pytest.raises(TimeoutError):
                socket.create_connection((port.name, port.port), 0.3)
    served = [x for x in listeners(two.servers[0].process.pid) if x.kind != "unix"]
    assert {(x.name, x.port) for x in served} == {(machines.address(0), two.port)}
    assert [x for x in listeners(two.servers[1].process.pid) if x.kind != "unix"] == []


def test_a_machine_that_lacks_the_file_is_named(two, dev):
    pool, theirs = two.attach(), two.folder / "models-1" / dev.name
    evaluate(pool, dev)
    pool.release()
    theirs.rename(theirs.with_suffix(".away"))
    with pytest.raises(RequestError, match=re.escape(f"looked in {theirs.parent}")):
        evaluate(pool, dev)
    theirs.with_suffix(".away").rename(theirs)
    assert evaluate(pool, dev).isfinite().all()


@pytest.mark.parametrize("weights", ["shared", "host"])
def test_weights_do_not_travel_between_machines(two, dev, weights):
    pool = two.attach()
    with pytest.raises(RequestError, match="^Set weights to whole in USP Optimization Settings, or use a smaller file"):
        evaluate(pool, dev, weights=weights)
    assert evaluate(pool, dev).isfinite().all()


def failure(pool, dev, what) -> str:
    later = Later(what)
    with pytest.raises(PoolError) as raised:
        sample(pool, dev, LONG, later.progress)
    assert later.watch.seconds < LIMIT, later.watch.seconds
    return str(raised.value)


@pytest.fixture
def pool(mortals, dev):
    """A client, before and after a test that ends what it uses."""
    pool = mortals.attach()
    expected = evaluate(pool, dev)
    yield pool
    assert torch.equal(evaluate(pool, dev), expected)


def test_a_rank_elsewhere_dies(pool, dev):
    rank = pids(pool)[1]
    told = failure(pool, dev, lambda: os.kill(rank, signal.SIGKILL))
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in told and f"({machines.address(1)})" in told, told


def test_a_rank_elsewhere_dies_while_nobody_waits(pool):
    rank = pids(pool)[1]
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: pool.status()["state"] == "off", LIMIT)
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in pool.status()["error"]


def test_a_rank_here_dies(pool, dev):
    rank = pids(pool)[0]
    told = failure(pool, dev, lambda: os.kill(rank, signal.SIGKILL))
    assert f"rank 0 (process {rank}) was ended by SIGKILL" in told, told


def test_a_rank_elsewhere_is_stopped(pool, dev):
    rank = pids(pool)[1]
    with pytest.raises(PoolError, match=rf"rank 1 \(process {rank}\) was stopped \(SIGSTOP, Ctrl-Z\)"):
        sample(pool, dev, LONG, Later(lambda: os.kill(rank, signal.SIGSTOP)).progress)


def test_a_machine_is_lost_and_comes_back(pool, mortals, dev):
    told = failure(pool, dev, lambda: mortals.servers[1].end(signal.SIGKILL))
    assert f"machine 1 ({machines.address(1)})" in told, told
    with pytest.raises(PoolError, match="Start `serve --node-rank 1` on its machine: 1 of 2 machines are there"):
        evaluate(pool, dev)
    mortals.start(1)


def test_the_link_between_machines_is_cut(pool, mortals, dev):
    said = "".join(mortals.servers[1].said).count("joined")
    told = failure(pool, dev, lambda: machines.cut(1))
    assert re.search(rf"machine 1 \({machines.address(1)}\) (was not heard of|is not connected)", told), told
    machines.join(1)
    wait_until(lambda: "".join(mortals.servers[1].said).count("joined") > said, 30)


@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_on_any_machine_ends_all(network, run_dirs, tmp_path, dev, number):
    for made in cluster(tmp_path, 1, dev):
        pool = made.attach()
        evaluate(pool, dev)
        ranks, watch = pids(pool), Stopwatch()
        made.servers[number].process.send_signal(signal.SIGTERM)
        assert [server.process.wait(LIMIT) for server in made.servers] == [0, 0]
        assert watch.seconds < LIMIT and not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


def test_the_client_is_cut_off(two, dev):
    """From machine 0, which goes on."""
    pool = two.attach()
    expected = evaluate(pool, dev)
    before = pids(pool)
    told = failure(pool, dev, lambda: machines.run("ip", "link", "set", machines.BRIDGE, "down"))
    assert "nothing was heard of it for" in told or "the connection was lost" in told
    machines.run("ip", "link", "set", machines.BRIDGE, "up")
    time.sleep(1)
    deadline = Stopwatch()
    while deadline.seconds < 30:
        try:
            assert torch.equal(evaluate(pool, dev), expected)
            break
        except PoolError:
            time.sleep(1)
    assert len(pids(pool)) == len(before)


def test_a_machine_that_does_not_fit_is_refused(two):
    """In the place of another, of another size, without the key."""
    arguments = ["--nnodes", "2", "--rdzv-endpoint", f"{machines.address(0)}:{two.port}", "--trust-network"]
    for more, told in (
        (["--node-rank", "1", "--gpus", "cpu:2"], "Give --gpus 1 cpu devices of the kind that the first machine has"),
        (["--node-rank", "1", "--gpus", "cpu:1"], rf"Give another --node-rank than 1: .*{machines.address(1)}"),
    ):
        with serving(two.folder, *arguments, *more, listen=None, prefix=machines.inside(1)) as other:
            other.says(told)
            assert other.process.wait(LIMIT) == 2
