"""What ComfyUI's memory management is told of the workers' weights, and what becomes of them then."""

from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.devices import Devices
from fastusp_backend.errors import PoolError

pytestmark = pytest.mark.unit

DEVICE = torch.device("cpu")


class Pool:
    busy = False


class Session:
    """Has a pool of its own; its weights take 10 bytes until they leave."""

    def __init__(self, *gpus: int):
        self.pool = Pool()
        self.pool.devices, self.pool.release = Devices(ranks=max(1, len(gpus)), gpus=gpus), self.evict
        self.nbytes, self.evicted, self.dead = 10, 0, False

    def resident_bytes(self):
        return self.nbytes

    def evict(self):
        self.nbytes, self.evicted = 0, self.evicted + 1
        if self.dead:
            raise PoolError("the workers have ended")

    make_room = evict

    def after_run(self):
        pass


@pytest.fixture
def memory(node_module):
    """The node's module; `listed`: the patchers that ComfyUI was told to list; `pools`: all."""
    listed, pools = [], []
    management = SimpleNamespace(
        load_models_gpu=listed.extend, soft_empty_cache=lambda: None, unload_all_models=lambda: "done"
    )
    module = node_module("memory", comfyui={"model_management": management}, pools={"all_pools": lambda: pools})
    module.listed, module.pools = listed, pools
    return module


def test_weights_leave_for_another_model(memory):
    session = Session(0)
    assert memory.RemoteWeights().evict(session) == 10 and session.nbytes == 0
    assert memory.RemoteWeights().evict(session) == 0 and session.evicted == 1, "there was nothing any more"


def test_workers_that_die_over_it_have_made_room(memory):
    session = Session(0)
    session.dead = True
    assert memory.RemoteWeights().evict(session) == 10


def test_weights_that_a_request_uses_stay_and_are_listed_again(memory):
    weights, session = memory.RemoteWeights(), Session(0)
    session.pool.busy = True
    assert weights.evict(session) == 0 and session.nbytes == 10
    weights.after_run(session, "the patcher")
    assert memory.listed == ["the patcher"]
    weights.after_run(session, "the patcher")
    assert memory.listed == ["the patcher"], "once for each time"


def test_other_pools_on_the_same_gpus_make_room(memory):
    weights, first, beside, second = memory.RemoteWeights(), Session(0, 1), Session(4), Session(1, 2)
    for session in (first, beside):
        weights.make_room(session, DEVICE, SimpleNamespace(session=session))
    second.nbytes = 0
    weights.make_room(second, DEVICE, SimpleNamespace(session=second))
    assert (first.nbytes, beside.nbytes) == (0, 10)


def test_unload_models_reaches_every_pool_that_runs_nothing(memory):
    weights, idle, busy = memory.RemoteWeights(), Session(), Session()
    busy.pool.busy = True
    memory.pools += [idle.pool, busy.pool]
    weights.follow_unload_all()
    assert memory.model_management.unload_all_models() == "done"
    assert (idle.nbytes, busy.nbytes) == (0, 10)
