"""A pool starts, answers and ends whatever launcher surrounds its host."""

import pytest
import torch
from pools import evaluate, pids, processes_of, run_dir
from support import relative_difference

from fastusp_backend.config import Layout

pytestmark = pytest.mark.dist

HOSTILE = {
    # Options of torchrun, for another one.
    "PET_NO_PYTHON": "1",
    "PET_MODULE": "1",
    "PET_RDZV_CONF": "store_type=file,is_host=0",
    "PET_RDZV_BACKEND": "etcd",
    "PET_NNODES": "4",
    "PET_NODE_RANK": "3",
    "PET_NPROC_PER_NODE": "8",
    "PET_STANDALONE": "1",
    "PET_RUN_PATH": "1",
    "PET_START_METHOD": "fork",
    "PET_TEE": "3",
    "PET_LOGS_SPECS": "none",
    "PET_MAX_RESTARTS": "many",
    # A rank of another job.
    "RANK": "5",
    "LOCAL_RANK": "5",
    "WORLD_SIZE": "32",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "ROLE_RANK": "5",
    "MASTER_ADDR": "10.255.255.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "other",
    "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon",
    "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "32",
    "SLURM_LOCALID": "5",
    "SLURM_NODELIST": "node[1-4]",
    "SLURM_STEP_GPUS": "0,1",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "32",
    "OMPI_COMM_WORLD_LOCAL_RANK": "5",
    "PMI_RANK": "5",
    "PMI_SIZE": "32",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "DEEPSPEED_TIMEOUT": "1",
    "CROSS_SIZE": "4",
    # Of Python.
    "PYTHONINSPECT": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONSTARTUP": "/nowhere.py",
    "PYTHON_EXEC": "/bin/false",
    "LOGLEVEL": "chatty",
    # Of interfaces and addresses that a job of several machines uses.
    "GLOO_SOCKET_IFNAME": "nowhere0",
    "NCCL_SOCKET_IFNAME": "nowhere0",
    "NCCL_COMM_ID": "10.255.255.1:29500",
    "TORCH_GLOO_LAZY_INIT": "1",
    # Of CUDA, which CPU ranks have none of.
    "CUDA_VISIBLE_DEVICES": "7",
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
}


def test_a_launcher_around_the_host_harms_nothing(shared_pool, new_pool, dev, monkeypatch):
    expected = evaluate(shared_pool(2), dev)
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    pool = new_pool(2)
    assert torch.equal(evaluate(pool, dev), expected)
    assert pool.status()["ranks"] == len(pids(pool)) == 2
    process, directory = pool._workers.processes.torchrun, run_dir(pool)
    pool.close()
    pool.close()
    assert process.wait(30) == 0 and not processes_of(directory) and not directory.exists()


def test_a_temporary_directory_that_is_cleaned(mortal, dev):
    """As systems do with files that are some days old; workers make new groups at any time."""
    expected, before, directory = evaluate(mortal, dev), pids(mortal), run_dir(mortal)
    kept = directory.with_name("kept")
    directory.rename(kept)
    assert relative_difference(evaluate(mortal, dev, Layout(ulysses=1, ring=2)), expected) < 2e-5
    assert pids(mortal) == before and not directory.exists()
    kept.rename(directory)  # for other tests
