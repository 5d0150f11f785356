"""Machines with GPUs, which are servers on this host that NCCL takes for several hosts and joins by sockets: the same
results as one GPU's."""

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ports import free_port
from serving import Serving, serving
from support import relative_difference
from test_batch_groups_on_gpus import GROUPS, guided
from test_pool import EAGER, ONE, sample, spec  # noqa: F401 - spec is a fixture

from fastusp_backend.config import Layout, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.keyfile import Key
from fastusp_backend.pool import Pool

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices, one for each machine"),
    pytest.mark.timeout(900),
]
needs_four = pytest.mark.skipif(GPUS < 4, reason="needs four CUDA devices, two for each machine")

SOCKETS = {"NCCL_IB_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
NO_PEERS = {"NCCL_P2P_DISABLE": "1"}
BOUND = 0.05
"""Of bfloat16, compiled and in other orders of sums, after six steps; 8 bits add less than 0.004. With half of the text
missing it is 0.16."""
END_SECONDS = 8
"""Ranks end by themselves within these; those that hang are ended after ten."""


@contextlib.contextmanager
def machines(folder: Path, model: str, gpus: tuple[str, ...], environment: dict[str, str]) -> Iterator[list[Serving]]:
    """A server for each of `gpus`, all of one run."""
    homes = [folder / f"machine-{number}" for number in range(len(gpus))]
    key = Key.read_or_make(homes[0] / "key")  # for all to start at once
    for home in homes[1:]:
        home.mkdir()
        shutil.copy(key.path, home)
    endpoint = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as servers:
        made = []
        for number, names in enumerate(gpus):
            variables = environment | {"NCCL_HOSTID": f"machine-{number}"}
            arguments = ["--gpus", names, "--nnodes", str(len(gpus)), "--node-rank", str(number)]
            arguments += ["--rdzv-endpoint", endpoint, "--models", str(Path(model).parent)]
            prefix = "env", *(f"{name}={value}" for name, value in variables.items())
            made.append(servers.enter_context(serving(homes[number], *arguments, listen=None, prefix=prefix)))
        for server in made[1:]:
            server.says("joined")
        yield made


@pytest.fixture(scope="module")
def alone():
    """One GPU, which the others are held against."""
    pool = Pool(Devices(ranks=1, gpus=(0,)))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def expected(alone, spec):  # noqa: F811
    return sample(alone, spec, ONE, EAGER)


@pytest.fixture(scope="module")
def two(spec, tmp_path_factory):  # noqa: F811
    """Two machines of one GPU each."""
    with machines(tmp_path_factory.mktemp("two"), spec.path, ("0", "1"), SOCKETS | NO_PEERS) as servers:
        yield servers


@pytest.fixture(scope="module", params=[{}, NO_PEERS], ids=["peer access", "no peer access"])
def four(request, spec, tmp_path_factory):  # noqa: F811
    """Two machines of two GPUs each, and how those of one send."""
    inside = "symmetric" if not request.param and torch.cuda.can_device_access_peer(0, 1) else "host"
    with machines(tmp_path_factory.mktemp("four"), spec.path, ("0,1", "2,3"), SOCKETS | request.param) as servers:
        yield servers, f"{inside} memory, nccl between machines"


def held_against_one(pool: Pool, spec, layout: Layout, kind: str, expected: torch.Tensor) -> None:  # noqa: F811
    """With each wire, in graphs, with a ring that is pipelined and one that is not; and eagerly."""
    for wire in ("exact", "int8", "fp8"):
        for pipelined in (True, False):
            settings = Settings(wire=wire, ring_pipeline=pipelined)
            assert relative_difference(sample(pool, spec, layout, settings), expected) < BOUND, (layout, settings)
        assert pool.held.transport.startswith(kind) and pool.held.transport.endswith(f", {wire} wire")
    assert relative_difference(sample(pool, spec, layout, EAGER), expected) < BOUND


@pytest.mark.parametrize("layout", [Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)], ids=str)
def test_two_machines_of_one_gpu(two, spec, expected, layout):  # noqa: F811
    held_against_one(two[0].attach(), spec, layout, "nccl", expected)


def test_the_network_is_measured(two, spec):  # noqa: F811
    pool = two[0].attach()
    sample(pool, spec, Layout(ulysses=1, ring=2), Settings(wire="auto"))
    assert "GB/s), int8 wire" in pool.held.transport, pool.held.transport


def test_two_machines_of_one_gpu_end_by_themselves(two, spec):  # noqa: F811
    """NCCL's end waits for that of the graphs which it is in. The last test of these servers."""
    sample(two[0].attach(), spec, Layout(ulysses=1, ring=2))
    began = time.monotonic()
    two[0].process.send_signal(signal.SIGTERM)
    assert [server.process.wait(30) for server in two] == [0, 0]
    assert time.monotonic() - began < END_SECONDS


@needs_four
def test_two_machines_of_two_gpus(four, spec, expected, alone):  # noqa: F811
    """Ulysses inside each, and a ring between them; one of both over all four; and batch groups, each in a machine."""
    servers, kind = four
    pool = servers[0].attach()
    held_against_one(pool, spec, Layout(ulysses=2, ring=2), kind, expected)
    for layout in (Layout(ulysses=4, ring=1), Layout(ulysses=1, ring=4)):
        assert relative_difference(sample(pool, spec, layout), expected) < BOUND
        assert pool.held.transport == "nccl, exact wire"
    for texts in ((35, 6), (6, 35)):
        got = guided(pool, spec, GROUPS, texts, Settings())
        assert relative_difference(got, guided(alone, spec, ONE, texts, EAGER)) < BOUND, texts
        assert pool.held.transport == f"{kind.partition(',')[0]}, exact wire"


@needs_four
def test_the_ring_between_machines_is_measured(four, spec):  # noqa: F811
    servers, kind = four
    pool = servers[0].attach()
    sample(pool, spec, Layout(ulysses=2, ring=2), Settings(wire="auto"))
    assert pool.held.transport.startswith(f"{kind} (") and "GB/s), int8 wire" in pool.held.transport
