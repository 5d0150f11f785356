"""How worker processes are started, and in which environment."""

import tempfile
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from fastusp_backend import devices
from fastusp_backend.devices import Devices, Gpu
from fastusp_backend.environment import inherited
from fastusp_backend.errors import DeviceError, PoolError
from fastusp_backend.pool import processes, workers
from fastusp_backend.pool.processes import worker_environment

pytestmark = pytest.mark.unit


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
    root = str(Path(processes.__file__).resolve().parents[2])
    assert worker_environment(Devices(ranks=2), tmp_path, {"PYTHONPATH": ""})["PYTHONPATH"] == root
    assert "PYTHONPATH" not in inherited({"PYTHONPATH": ""})


def test_gpus_are_handed_down_by_uuid(tmp_path, monkeypatch):
    gpus = tuple(Gpu(index=i, name="H200", uuid=f"GPU-{i}", compute_capability=(9, 0)) for i in range(4))
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    env = worker_environment(Devices(ranks=2, gpus=(3, 1)), tmp_path, {"CUDA_VISIBLE_DEVICES": "1,3"})
    assert env["FASTUSP_DEVICE_TYPE"] == "cuda" and env["CUDA_VISIBLE_DEVICES"] == "GPU-3,GPU-1"
    assert env["OMP_NUM_THREADS"] == "1", "as torchrun says where it starts ranks itself"
    assert "OMP_NUM_THREADS" not in worker_environment(Devices(ranks=1, gpus=(3,)), tmp_path, {})
    with pytest.raises(DeviceError, match="GPU 7 does not exist"):
        workers.Workers(Devices(ranks=1, gpus=(7,)))


def test_torchrun_that_cannot_be_started_is_told(tmp_path, monkeypatch):
    def full_disk(path, *_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(processes, "open", full_disk, raising=False)
    started = workers.Workers(Devices(ranks=1))
    with pytest.raises(PoolError, match="did not start: torchrun could not be started: .*No space left.*torchrun.log"):
        raise started.failure("did not start")
    started.dispose()
    assert not started.run_dir.path.exists()
