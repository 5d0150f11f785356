"""Ranks on several machines, which are network namespaces of this host: the same results as one machine's."""

import contextlib
import os
import re
import shutil
import signal
import socket

import machines
import pytest
import torch
from listening import listeners
from pools import GIVEN, PROMPT, SHORT, evaluate, pids, sample, session
from serving import serving
from support import SMALL, parent, relative_difference, wait_until
from test_patches import QKV, lora, patched, stack
from test_serve_life import LIMIT, failure

from fastusp_backend.__main__ import main
from fastusp_backend.cli import bench
from fastusp_backend.config import Layout
from fastusp_backend.errors import RequestError
from fastusp_backend.keyfile import Key
from fastusp_backend.planner import legal_layouts, plan_batches
from fastusp_backend.pool import Progress, attached
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.dist

GUIDED = {"positive": PROMPT, "negative": PROMPT, "cfg": 2.0, "sampler": "euler"}
RING = Layout(ulysses=1, ring=3)


@pytest.fixture(scope="module")
def four(network, run_dirs, tmp_path_factory, dev):
    """Two machines of two ranks each."""
    with machines.cluster(tmp_path_factory.mktemp("four"), 2, 2, dev) as made:
        yield made


@pytest.fixture(scope="module")
def three(network, run_dirs, tmp_path_factory, dev):
    """Three machines of one rank each."""
    with machines.cluster(tmp_path_factory.mktemp("three"), 3, 1, dev) as made:
        yield made


@pytest.fixture(scope="module")
def one(shared_pool, dev):
    """A step, and a guided image, of one rank."""
    alone = shared_pool(1)
    return evaluate(alone, dev), session(alone, dev).sample(GIVEN.x, SHORT, **GUIDED)


def test_two_machines_of_two_ranks(four, one, dev):
    """Ulysses inside a machine, a ring between them, and batch groups: what is chosen, and what is not."""
    pool = four.attach()
    assert (pool.devices.ranks, pool.devices.per_machine) == (4, 2)
    groups, chosen = plan_batches(4, SMALL.heads, per_machine=2)[1:]
    assert (groups, chosen) == (Layout(batch=2, ulysses=2, ring=1), Layout(ulysses=2, ring=2))
    assert chosen == legal_layouts(4, SMALL.heads, 2)[0]
    for layout in (chosen, Layout(ulysses=4, ring=1)):
        assert relative_difference(evaluate(pool, dev, layout), one[0]) < 2e-5
    assert relative_difference(session(pool, dev, groups).sample(GIVEN.x, SHORT, **GUIDED), one[1]) < 2e-5
    wait_until(lambda: len(pool.status()["memory"]) == 4 and all(pool.status()["memory"]), 5)
    wait_until(lambda: any(machines.address(1) in line and "[rank 2]" in line for line in pool.log_since(0)[0]), 5)


@pytest.mark.parametrize("wire, most", [("exact", 2e-5), ("int8", 2e-2), ("fp8", 6e-2)])
def test_a_ring_between_machines_with_each_wire(four, one, dev, wire, most):
    """Pipelined, and not: the same values; what travels in 8 bits is close, and is not the exact one."""
    pool, layout = four.attach(), Layout(ulysses=2, ring=2)
    got = [evaluate(pool, dev, layout, wire=wire, ring_pipeline=pipelined) for pipelined in (True, False)]
    assert torch.equal(*got)
    assert (
        wire == "exact" or relative_difference(got[0], one[0]) > 1e-4
    ) and pool.held.transport == f"gloo, {wire} wire"
    assert relative_difference(got[0], one[0]) < most


def test_bench_measures_both_links(four, dev, monkeypatch, capsys):
    """From a machine that has no devices of its own."""
    four.attach()
    server = "--gpus", four.servers[0].address, "--key", str(four.key)
    monkeypatch.setattr(bench, "LINEARS", ("exact",))  # with the products in fp8 it would take twice as long
    monkeypatch.setattr(bench, "WIRES", ("exact", "int8"))
    sizes = "--size", "64", "--text", "9", "--steps", "1"
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "bench", str(dev), *server, *sizes])
    code, (printed, errors) = main(), capsys.readouterr()
    assert code == 0, printed + errors
    title, inside, between, advice, _, *rows = printed.splitlines()
    assert f"on {four.servers[0].address}; 64x64 px" in title
    assert inside.startswith("inside a machine, batch 2 x ulysses 2 x ring 1: gloo")
    assert between.startswith("between machines, ulysses 2 x ring 2: gloo")
    assert "plan FILE --nnodes 2 --network GBIT" in advice
    found = [re.split(r" {2,}", row.strip()) for row in rows[:2]]
    assert [row[:4] for row in found] == [["4", "ulysses 2 x ring 2", wire, "exact"] for wire in ("exact", "int8")]
    assert all(float(row[5]) > 0 and row[6] == "-" for row in found)
    assert f"gpus = {four.servers[0].address} (4 ranks), ulysses = 0, ring = 0 (automatic)" in rows[2]


@pytest.mark.thorough
def test_one_machine_of_two_ranks(network, run_dirs, one, dev, tmp_path):
    """That its clients reach by its address, which is all that it listens at."""
    with serving(
        tmp_path,
        *("--gpus", "cpu:2", "--models", str(dev.parent)),
        listen=f"{machines.address(0)}:{next(machines.PORTS)}",
        prefix=machines.inside(0),
    ) as server:
        pool = server.attach()
        for layout in (Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)):
            assert relative_difference(evaluate(pool, dev, layout), one[0]) < 2e-5
        assert not pool._workers.channel.shares_memory
        groups = session(pool, dev, Layout(batch=2, ulysses=1, ring=1))
        assert relative_difference(groups.sample(GIVEN.x, SHORT, **GUIDED), one[1]) < 2e-5
        net = [x for x in listeners(server.process.pid) if x.kind != "unix"]
        assert [f"{x.name}:{x.port}" for x in net] == [server.address]
        inside = [x for rank in pids(pool) for x in listeners(rank) if x.kind != "unix"]
        assert {x.name for x in inside} <= {"127.0.0.1", "::1"}, inside


def test_patches_reach_all_machines(four, shared_pool, dev):
    patches = stack({QKV: [lora(QKV, 3)]})
    assert relative_difference(patched(four.attach(), dev, patches), patched(shared_pool(1), dev, patches)) < 2e-5


def test_large_tensors_reach_the_other_machine(four, dev):
    """Those of a ControlNet, which ranks of one machine map."""
    pool = four.attach()
    residuals = {"input": [torch.randn(1, 12, 512) for _ in range(2)], "output": []}
    run = session(pool, dev, Layout(ulysses=2, ring=2))
    plain = evaluate(pool, dev, Layout(ulysses=2, ring=2))
    got = run.evaluate(GIVEN.x, GIVEN.timestep, PROMPT, Progress(), control=residuals)
    large = run.evaluate(GIVEN.x.repeat(64, 1, 1, 1), GIVEN.timestep.repeat(64), _repeated(64), Progress())
    assert relative_difference(got, plain) > 1e-3
    assert relative_difference(large[:1], plain) < 2e-5


def _repeated(times: int) -> Prompt:
    return Prompt(*(t.repeat(times, *[1] * (t.dim() - 1)) for t in (GIVEN.context, GIVEN.y, GIVEN.guidance)))


def test_what_listens(four, dev):
    """The server's port, and gloo's, which take nobody any more, each on its machine's own address."""
    pool = four.attach()
    evaluate(pool, dev)
    ranks = pids(pool)
    for number, rank in enumerate(ranks):
        net = [x for x in listeners(rank) if x.kind != "unix"]
        assert {x.name for x in net} <= {machines.address(number // 2)}, net
        for port in net[:1]:
            with pytest.raises(TimeoutError):
                socket.create_connection((port.name, port.port), 0.3)
    served = [x for x in listeners(four.servers[0].process.pid) if x.kind != "unix"]
    assert {(x.name, x.port) for x in served} == {(machines.address(0), four.port)}
    torchruns = {parent(rank) for rank in ranks}
    assert len(torchruns) == 2
    for silent in (four.servers[1].process.pid, *torchruns):
        assert [x for x in listeners(silent) if x.kind != "unix"] == []


def test_a_machine_that_lacks_the_file_is_named(four, dev):
    pool, theirs = four.attach(), four.models(1) / dev.name
    evaluate(pool, dev)
    pool.release()
    theirs.rename(theirs.with_suffix(".away"))
    with pytest.raises(RequestError, match=re.escape(f"looked in {theirs.parent}")):
        evaluate(pool, dev)
    theirs.with_suffix(".away").rename(theirs)
    assert evaluate(pool, dev).isfinite().all()


def test_a_machine_that_has_another_file_is_named(four, dev):
    pool, theirs = four.attach(), four.models(1) / dev.name
    evaluate(pool, dev)
    pool.release()
    data = bytearray(theirs.read_bytes())
    data[-1] ^= 1
    theirs.write_bytes(data)
    with pytest.raises(RequestError, match=re.escape(f"{theirs} is another file (other contents)")):
        evaluate(pool, dev)
    shutil.copy(dev, theirs)
    assert evaluate(pool, dev).isfinite().all()


def test_a_machine_without_the_key_does_not_come_in(four, dev, tmp_path):
    """Neither with another server's key, nor with this one's certificate and another secret; and it harms nobody."""
    pool = four.attach()
    expected, before = evaluate(pool, dev), pids(pool)
    Key.read_or_make(tmp_path / "another" / "key")
    forged = tmp_path / "forged" / "key"
    forged.parent.mkdir()
    shutil.copy(four.key, forged)
    forged.write_text(re.sub("secret [0-9a-f]+", f"secret {'0' * 64}", forged.read_text()))
    for key in (tmp_path / "another" / "key", forged):
        stranger = four.start(1, key.parent)
        assert stranger.process.wait(LIMIT) == 2
        stranger.says(f"Copy the key file from {machines.address(0)}:{four.port} again: {key} is another server's")
        stranger.close()
    four.servers[0].says(f"refused {machines.address(1)}", 15)
    assert torch.equal(evaluate(pool, dev), expected) and pids(pool) == before


@pytest.mark.parametrize("weights", ["shared", "host"])
def test_weights_do_not_travel_between_machines(four, dev, weights):
    pool = four.attach()
    with pytest.raises(RequestError, match="^Set weights to whole in USP Optimization Settings, or use a smaller file"):
        evaluate(pool, dev, weights=weights)
    assert evaluate(pool, dev).isfinite().all()


@pytest.mark.thorough
def test_the_client_is_cut_off(four, dev, monkeypatch):
    """The workers stay. How long it really takes, `test_a_server_that_is_stopped_is_lost` tells."""
    monkeypatch.setattr(attached, "LOST_SECONDS", 4)
    pool = four.attach()
    expected, before = evaluate(pool, dev), pids(pool)
    with contextlib.ExitStack() as cut:
        told = failure(pool, dev, lambda: cut.enter_context(machines.host_cut_off()))
    assert "nothing was heard of it for" in told or "the connection was lost" in told
    assert torch.equal(evaluate(pool, dev), expected) and pids(pool) == before


@pytest.mark.parametrize(
    "how, counted",
    [
        ("tbf rate 20mbit burst 32kbit latency 400ms", "overlimits"),
        ("tbf rate 20mbit burst 32kbit limit 6000", "drops"),
        ("netem delay 30ms 10ms loss 2%", "drops"),
    ],
    ids=["slow", "slow and lossy", "late and lossy"],
)
def test_a_slow_link_gives_the_same_image(four, dev, how, counted):
    """At one of two machines; the system's own counts say that packets had to wait, or were lost."""
    pool, layout = four.attach(), Layout(ulysses=2, ring=2)
    expected = sample(pool, dev, layout=layout)
    with contextlib.ExitStack() as shaped:
        try:
            counts = shaped.enter_context(machines.shaped(1, *how.split()))
        except OSError as error:
            pytest.skip(f"this system's tc cannot do it: {error}")
        assert torch.equal(sample(pool, dev, layout=layout), expected)
        assert counts()[counted] > 0, counts()


def test_sigterm_on_a_machine_ends_all(four, dev):
    """The last test of these servers."""
    pool = four.attach()
    evaluate(pool, dev)
    four.sigterm_ends_all(0, pids(pool), LIMIT)


@pytest.mark.thorough
def test_three_machines_of_one_rank(three, one, dev):
    """A ring, and batch groups of three images."""
    pool = three.attach()
    assert (pool.devices.ranks, pool.devices.per_machine) == (3, 1)
    for wire, most in (("exact", 2e-5), ("int8", 2e-2)):
        assert relative_difference(evaluate(pool, dev, RING, wire=wire), one[0]) < most
    run = session(pool, dev, Layout(batch=3, ulysses=1, ring=1))
    images = run.sample(GIVEN.x.repeat(3, 1, 1, 1), SHORT, sampler="euler", positive=_repeated(3))
    assert relative_difference(images, sample(three.attach(), dev, layout=RING).repeat(3, 1, 1, 1)) < 2e-5


@pytest.mark.thorough
def test_a_machine_of_three_dies(three, dev):
    """The last test of these servers: it is named among the others, and none of their processes stays."""
    pool = three.attach()
    evaluate(pool, dev, RING)
    ranks = pids(pool)
    told = failure(pool, dev, lambda: three.servers[2].end(signal.SIGKILL), layout=RING)
    assert f"machine 2 ({machines.address(2)})" in told, told
    wait_until(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks), LIMIT)
