"""The life of a rank: it meets the others, and serves."""

import functools
import json
import logging
import os
from pathlib import Path

import numpy.ctypeslib  # noqa: F401 - this and the one below: else a request would import them, see agreement.py
import torch
import torch.distributed as dist
import torch.utils._device  # noqa: F401

from ..comm.groups import GROUP_TIMEOUT
from ..engine import Engine, Warming
from ..protocol import VERSION, Ready
from .control import Control
from .crew import Crew
from .meeting import meeting_of
from .nearby import stay_near
from .process import STORE_VARIABLE, record_failure
from .runner import Runner

log = logging.getLogger(__name__)


def _device() -> torch.device:
    if os.environ["FASTUSP_DEVICE_TYPE"] == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def work(run_dir: Path) -> None:
    """Returns when the client has had enough."""
    device = _device()
    # The ranks find each other in a file, or at the server: torch's other stores listen.
    meeting = meeting_of(os.environ)
    found = meeting.store() if meeting else dist.FileStore(os.environ[STORE_VARIABLE])
    place = {"store": dist.PrefixStore("ranks", found), "rank": int(os.environ["RANK"])}
    place |= {"world_size": int(os.environ["WORLD_SIZE"]), "timeout": GROUP_TIMEOUT}
    warming = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stay_near(device)
        warming = Warming(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **place)
        name = torch.cuda.get_device_name(device)
    else:
        dist.init_process_group("gloo", **place)
        threads = torch.get_num_threads()
        name = f"cpu ({threads} thread{'s' * (threads > 1)})"
    crew = Crew(pins=device.type == "cuda", one_machine=meeting is None)
    log.info("rank %d of %d on %s", crew.rank, crew.size, name)
    members = [json.loads(x) for x in crew.all_gather(json.dumps([name, os.getpid()]))]
    control = None
    if crew.rank == 0:
        ready = Ready(
            version=VERSION,
            devices=[name for name, _ in members],
            pids=[pid for _, pid in members],
            torch=str(torch.__version__),
            backend=dist.get_backend() if device.type == "cpu" else "nccl",
        )
        key = (run_dir / "key").read_bytes()
        control = Control(str(run_dir / "control.sock"), key, ready, functools.partial(record_failure, run_dir, 0))
    engine = Engine(device, warming)
    Runner(crew, engine, control).serve()
    engine.drop_evaluations()  # NCCL's end waits for that of all graphs it is in
    crew.agree(True)
    dist.destroy_process_group()
