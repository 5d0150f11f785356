"""What ends on one of several machines, which are network namespaces of this host: told within ten seconds, with the
machine, and the next prompt is right."""

import os
import re
import signal
import threading

import machines
import pytest
import torch
from pools import GIVEN, LONG, PROMPT, SHORT, evaluate, pids, sample, session
from support import parent, relative_difference, wait_until
from test_serve_life import LIMIT, Later, failure

from fastusp_backend.config import Layout
from fastusp_backend.errors import PoolError
from fastusp_backend.pool import hangs

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def two(network, run_dirs, tmp_path_factory, dev):
    """Two machines of one rank each."""
    with machines.cluster(tmp_path_factory.mktemp("two"), 2, 1, dev) as made:
        yield made


@pytest.fixture
def pool(two, dev):
    """A client, before and after a test that ends what it uses."""
    pool = two.attach()
    expected = evaluate(pool, dev)
    yield pool
    assert torch.equal(evaluate(pool, dev), expected)


def test_two_machines_of_one_rank(two, shared_pool, dev):
    pool, local, one = two.attach(), shared_pool(2), evaluate(shared_pool(1), dev)
    for layout in (Layout(ulysses=1, ring=2), Layout(ulysses=2, ring=1)):
        got = evaluate(pool, dev, layout)
        assert torch.equal(got, evaluate(local, dev, layout)) and relative_difference(got, one) < 2e-5
    assert torch.equal(sample(pool, dev), sample(local, dev))
    groups = {"positive": PROMPT, "negative": PROMPT, "cfg": 2.0, "sampler": "euler"}
    run, beside = (session(x, dev, Layout(batch=2, ulysses=1, ring=1)) for x in (pool, local))
    assert torch.equal(run.sample(GIVEN.x, SHORT, **groups), beside.sample(GIVEN.x, SHORT, **groups))


def test_a_rank_elsewhere_dies(pool, dev):
    rank = pids(pool)[1]
    told = failure(pool, dev, lambda: os.kill(rank, signal.SIGKILL))
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in told and f"({machines.address(1)})" in told, told


def test_a_rank_elsewhere_dies_and_its_torchrun_is_late(pool, dev):
    """The ranks here, which lose it at once, are not taken for the cause, nor is that machine ended before it tells."""
    rank = pids(pool)[1]
    torchrun = parent(rank)
    late = threading.Timer(2.0, os.kill, (torchrun, signal.SIGCONT))

    def die() -> None:
        os.kill(torchrun, signal.SIGSTOP)
        os.kill(rank, signal.SIGKILL)
        late.start()

    try:
        told = failure(pool, dev, die)
    finally:
        late.join()
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in told and f"({machines.address(1)})" in told, told


@pytest.mark.thorough
def test_a_rank_elsewhere_dies_while_nobody_waits(pool):
    rank = pids(pool)[1]
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: pool.status()["state"] == "off", LIMIT)
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in pool.status()["error"]


@pytest.mark.thorough
def test_a_rank_here_dies(pool, dev):
    rank = pids(pool)[0]
    told = failure(pool, dev, lambda: os.kill(rank, signal.SIGKILL))
    assert f"rank 0 (process {rank}) was ended by SIGKILL" in told, told


def test_a_rank_elsewhere_is_stopped(pool, dev):
    """It counts as stopped after ten seconds."""
    rank = pids(pool)[1]
    later = Later(lambda: os.kill(rank, signal.SIGSTOP))
    with pytest.raises(PoolError, match=rf"rank 1 \(process {rank}\) was stopped \(SIGSTOP, Ctrl-Z\)"):
        sample(pool, dev, LONG, later.progress)
    assert hangs.STOPPED_SECONDS <= later.watch.seconds < hangs.STOPPED_SECONDS + 5


def test_a_machine_is_lost_and_comes_back(pool, two, dev):
    told = failure(pool, dev, lambda: two.servers[1].end(signal.SIGKILL))
    assert f"machine 1 ({machines.address(1)})" in told, told
    with pytest.raises(PoolError, match="Start `serve --node-rank 1` on its machine: 1 of 2 machines are there"):
        evaluate(pool, dev)
    two.start_again(1)


def test_the_first_machine_is_lost_and_comes_back(pool, two, dev):
    """The other one ends its ranks, waits, and joins by itself."""
    expected, ranks = sample(pool, dev), pids(pool)
    said = "".join(two.servers[1].said).count("joined")
    told = failure(pool, dev, lambda: two.servers[0].end(signal.SIGKILL))
    assert f"The FastUSP workers of {machines.address(0)}:{two.port} stopped while a prompt ran" in told, told
    assert "the connection was lost" in told, told
    wait_until(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks), LIMIT)
    two.servers[1].says("the first machine is lost")
    with pytest.raises(PoolError, match=f"no server answers at {machines.address(0)}"):
        evaluate(pool, dev)
    two.start_again(0)
    wait_until(lambda: "".join(two.servers[1].said).count("joined") > said, 5)
    assert torch.equal(sample(pool, dev), expected) and not set(pids(pool)) & set(ranks)


def test_the_link_between_machines_is_cut(pool, two, dev):
    said = "".join(two.servers[1].said).count("joined")
    told = failure(pool, dev, lambda: machines.cut(1))
    assert re.search(rf"machine 1 \({machines.address(1)}\) (was not heard of|is not connected)", told), told
    machines.join(1)
    wait_until(lambda: "".join(two.servers[1].said).count("joined") > said, 30)


def test_sigterm_on_another_machine_ends_all(two, dev):
    """The last test of these servers."""
    pool = two.attach()
    evaluate(pool, dev)
    two.sigterm_ends_all(1, pids(pool), LIMIT)
