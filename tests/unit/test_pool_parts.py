"""The client's bookkeeping: kept tensors, what a session sends after failures, the workers' environment."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support import SOME_FILE, randn
from torch.distributed import run as torchrun

from fastusp_backend import devices
from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.devices import Devices, Gpu
from fastusp_backend.environment import inherited
from fastusp_backend.errors import Cancelled, DeviceError, PoolError, RequestError
from fastusp_backend.pool import workers
from fastusp_backend.pool.kept import KEPT_TENSORS, KeptTensors
from fastusp_backend.pool.patches import HeldPatches
from fastusp_backend.pool.progress import QUIET
from fastusp_backend.pool.session import Session, _distinct
from fastusp_backend.pool.workers import worker_environment
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit


@dataclass
class Pool:
    """Stands for a pool: holds what it was told to keep, as the workers do; fails as often as `failures` says."""

    failures: list[BaseException] = field(default_factory=list)
    epoch: int = 1
    kept: KeptTensors = field(default_factory=KeptTensors)
    patches: HeldPatches = field(default_factory=HeldPatches)
    held: dict[int, torch.Tensor] = field(default_factory=dict)
    sent: list[set[str]] = field(default_factory=list)

    def start(self):
        pass

    def run(self, make, tensors, progress):
        if self.failures:
            raise self.failures.pop()
        request = make(1)
        self.sent.append(set(tensors))
        for number in request.forget:
            self.held.pop(number, None)
        self.held |= {number: tensors[name] for name, number in request.keep.items()}
        missing = [name for name, number in request.reuse.items() if number not in self.held]
        if missing:
            raise RequestError(f"not kept: {missing}")
        used = {name: self.held[number] for name, number in (request.keep | request.reuse).items()}
        return {"output": used["context"]}


def session(pool) -> Session:
    spec = ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32")
    return Session(pool, spec, (Layout(ulysses=1, ring=1),), Settings())


def evaluate(pool, context: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(1, 16, 4, 4)
    return session(pool).evaluate(x, torch.ones(1), Prompt(context, torch.ones(1, 4)), QUIET)


def test_a_prompt_is_sent_once():
    pool = Pool()
    contexts = [randn(1, 3, 4, seed=i) for i in range(2)]
    for context in (contexts[0], contexts[0].clone(), contexts[1], contexts[0]):
        assert torch.equal(evaluate(pool, context), context)
    assert pool.sent == [{"x", "timestep", "context", "y"}, {"x", "timestep"}, {"x", "timestep", "context"}] + [
        {"x", "timestep"}
    ]


def test_a_tensor_that_its_owner_changes_is_sent_again():
    pool, context = Pool(), torch.zeros(1, 3, 4)
    evaluate(pool, context)
    context += 1
    assert torch.equal(evaluate(pool, context), torch.ones(1, 3, 4))


def test_a_prompt_of_more_tensors_than_are_kept_is_kept_whole():
    pool, given = Pool(), torch.ones(1, 3, 4)
    many = Prompt(given, references=tuple(randn(1, 16, 2, 2, seed=n) for n in range(KEPT_TENSORS + 2)))
    for _ in range(2):
        session(pool).evaluate(torch.zeros(1), torch.ones(1), many, QUIET)
        session(pool).evaluate(torch.zeros(1), torch.ones(1), Prompt(given * 2), QUIET)
        session(pool).evaluate(torch.zeros(1), torch.ones(1), Prompt(given), QUIET)
    assert len(pool.held) <= KEPT_TENSORS + 2


def test_control_travels_once_a_tensor_in_the_compute_type():
    """ComfyUI repeats the tensors of a ControlNet with few blocks."""
    requests = []

    class Recorder(Pool):
        def run(self, make, tensors, progress):
            requests.append((make(1).control, {name: t for name, t in tensors.items() if name.startswith("control")}))
            return super().run(make, tensors, progress)

    one, two = torch.ones(1, 4, 8).half(), torch.zeros(1, 4, 8).half()
    control = {"input": [one, one, None, two], "output": [two]}
    session(Recorder()).evaluate(torch.zeros(1), torch.ones(1), Prompt(torch.ones(1, 3, 4)), QUIET, control)
    ((places, tensors),) = requests
    assert places == {"input": [0, 0, None, 1], "output": [1]}
    assert list(tensors) == ["control.0", "control.1"]
    assert all(t.dtype == torch.float32 for t in tensors.values()) and torch.equal(tensors["control.1"], two.float())


def test_equal_control_travels_once():
    """ComfyUI adds up two ControlNets' tensors block by block, and expands one over a batch."""
    residuals = [torch.full((2, 4, 8), value) for value in (1.0, 2.0, 1.0)]
    residuals[1][0, 0] = 1  # begins like the others
    expanded = torch.ones(1, 4, 8).expand(2, 4, 8)
    places, tensors = _distinct({"input": [*residuals, expanded], "output": [None, expanded]}, torch.float32)
    assert places == {"input": [0, 1, 0, 2], "output": [None, 2]}
    assert [len(t) for t in tensors.values()] == [2, 2, 1]
    assert torch.equal(tensors["control.1"], residuals[1])
    for other in (torch.ones(2, 4, 8).double(), torch.ones(2, 8, 4), torch.tensor(1.0), torch.empty(0, 4, 8)):
        assert _distinct({"input": [residuals[0], other]}, torch.float32)[0] == {"input": [0, 1]}


def test_types_are_told_apart():
    pool = Pool()
    evaluate(pool, torch.zeros(1, 3, 4))
    assert evaluate(pool, torch.zeros(1, 3, 4).half()).dtype == torch.float16


def test_what_is_used_last_is_forgotten_last():
    pool = Pool()
    first = randn(1, 3, 4, seed=100)
    for i in range(3 * KEPT_TENSORS):
        evaluate(pool, first)
        evaluate(pool, randn(1, 3, 4, seed=i))
    assert len(pool.held) <= KEPT_TENSORS + 1
    assert sum("context" in names for names in pool.sent) == 3 * KEPT_TENSORS + 1


@pytest.mark.parametrize("error", [Cancelled("while starting"), RequestError("refused"), KeyboardInterrupt()], ids=repr)
def test_after_a_failure_everything_is_sent_anew(error):
    pool, contexts = Pool(), [randn(1, 3, 4, seed=i) for i in range(2)]
    evaluate(pool, contexts[0])
    pool.failures = [error]
    with pytest.raises(type(error)):
        evaluate(pool, contexts[1])
    for context in contexts:
        assert torch.equal(evaluate(pool, context), context)
    assert "context" in pool.sent[-1] and "context" in pool.sent[-2]
    assert len(pool.held) == 3


def test_a_new_generation_is_sent_everything():
    pool, context = Pool(), randn(1, 3, 4, seed=0)
    evaluate(pool, context)
    pool.held.clear()
    pool.epoch += 1
    assert torch.equal(evaluate(pool, context), context)


PASSED = {
    "HOME": "/home/me",
    "HF_HOME": "/cache",
    "LD_LIBRARY_PATH": "/lib",
    "PYTHONHOME": "/python",
    "PYTHONSAFEPATH": "1",
    "NCCL_DEBUG": "INFO",
    "NVSHMEM_DEBUG": "INFO",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "TORCH_LOGS": "+dynamo",
    "OMP_NUM_THREADS": "3",
    "CUDA_LAUNCH_BLOCKING": "1",
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "SLURM_PROCID": "3",
    "OMPI_COMM_WORLD_RANK": "3",
    "PETNAME": "Rex",
}
DENIED = {
    "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    "PYTORCH_ALLOC_CONF": "x",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "RANK": "5",
    "LOCAL_RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "elsewhere",
    "MASTER_PORT": "1",
    "NCCL_COMM_ID": "elsewhere:1",
    "TORCH_GLOO_LAZY_INIT": "1",
    "TORCHELASTIC_RUN_ID": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon",
    "PET_NNODES": "4",
    "PET_NO_PYTHON": "1",
    "PET_OF_NO_OPTION_YET": "1",
    "PYTHON_EXEC": "/bin/false",
    "PYTHONINSPECT": "1",
    "LOGLEVEL": "chatty",
    "FASTUSP_OTHER": "/old",
}


def test_the_environment_is_inherited_less_a_denylist(tmp_path):
    env = worker_environment(Devices(ranks=2), tmp_path, PASSED | DENIED | {"CUDA_VISIBLE_DEVICES": "7"})
    assert env["FASTUSP_RUN_DIR"] == str(tmp_path) and env["FASTUSP_DEVICE_TYPE"] == "cpu"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert {name: env.get(name) for name in PASSED} == PASSED
    assert not DENIED.keys() & env.keys()


def test_workers_listen_on_the_loopback_interface_whatever_their_host_uses(tmp_path):
    theirs = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0,ib", "NCCL_SOCKET_FAMILY": "AF_INET6"}
    env = worker_environment(Devices(ranks=2), tmp_path, theirs | {"NCCL_RAS_ENABLE": "1"})
    assert env["GLOO_SOCKET_IFNAME"] == "lo" and env["NCCL_SOCKET_IFNAME"] == "=lo"
    assert env["NCCL_SOCKET_FAMILY"] == "AF_INET" and env["NCCL_RAS_ENABLE"] == "0"


def test_compiled_code_lies_in_a_private_folder(tmp_path):
    """A folder of /tmp with the name that torch would take may be another user's."""
    env = worker_environment(Devices(ranks=1), tmp_path / "run", {})
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torchinductor")
    theirs = {"TORCHINDUCTOR_CACHE_DIR": "/theirs"}
    assert theirs.items() <= worker_environment(Devices(ranks=1), tmp_path / "run", theirs).items()


def test_every_option_of_torchrun_is_ours_alone(tmp_path):
    """As torch reads them: PET_ and the option's name."""
    options = {f"PET_{action.dest.upper()}": "1" for action in torchrun.get_args_parser()._actions}
    assert "PET_RDZV_CONF" in options
    assert not options.keys() & worker_environment(Devices(ranks=2), tmp_path, options).keys()


def test_folders_of_imports_mean_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, expected in [("/mine:src", ["/mine", str(tmp_path / "src")]), (":/mine", [str(tmp_path), "/mine"])]:
        env = worker_environment(Devices(ranks=2), tmp_path, {"PYTHONPATH": given})
        assert env["PYTHONPATH"].split(":")[1:] == expected
    root = str(Path(workers.__file__).resolve().parents[2])
    assert worker_environment(Devices(ranks=2), tmp_path, {"PYTHONPATH": ""})["PYTHONPATH"] == root
    assert "PYTHONPATH" not in inherited({"PYTHONPATH": ""})


def test_gpus_are_handed_down_by_uuid(tmp_path, monkeypatch):
    gpus = tuple(Gpu(index=i, name="H200", uuid=f"GPU-{i}", compute_capability=(9, 0)) for i in range(4))
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    env = worker_environment(Devices(ranks=2, gpus=(3, 1)), tmp_path, {"CUDA_VISIBLE_DEVICES": "1,3"})
    assert env["FASTUSP_DEVICE_TYPE"] == "cuda" and env["CUDA_VISIBLE_DEVICES"] == "GPU-3,GPU-1"
    with pytest.raises(DeviceError, match="GPU 7 does not exist"):
        workers.Workers(Devices(ranks=1, gpus=(7,)))


def test_torchrun_that_cannot_be_started_is_told(tmp_path, monkeypatch):
    def full_disk(path, *_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers, "open", full_disk, raising=False)
    started = workers.Workers(Devices(ranks=1))
    with pytest.raises(PoolError, match="did not start: torchrun could not be started: .*No space left.*torchrun.log"):
        raise started.failure("did not start")
    started.dispose()
    assert not started.run_dir.path.exists()
