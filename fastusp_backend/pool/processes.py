"""The processes of a pool: torchrun, which starts the ranks, from its start to its end, and the environment of all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelSpec
from ..devices import Devices, cuda_visible
from ..environment import inherited
from ..library import MODELS_VARIABLE
from ..ports import ADDRESSES_VARIABLE
from ..worker.process import MEETING_VARIABLE, PARENT_VARIABLE, RUN_DIR_VARIABLE
from .cause import ranked_cause

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "=lo",
    "NCCL_SOCKET_FAMILY": "AF_INET",  # NCCL leaves out the loopback interface's other address
    "NCCL_RAS_ENABLE": "0",  # what answers questions about NCCL's state, to whoever asks
}
"""A pool's ranks share a host: what they open listens there alone, whatever their host uses for other jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which machine of several a torchrun is on, and where they meet.

    run: the name of this life of the workers.
    address: host:port of the server that keeps their store. key: the path of its key file.
    interface: the network interface by which this machine reaches the others.
    addresses: of all machines, in their order.
    """

    machine: int
    run: str
    address: str
    key: str
    interface: str
    addresses: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """What ranks on several machines have in place of `_LOOPBACK`, and what `meeting` needs."""
        return {
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": f"={self.interface}",
            ADDRESSES_VARIABLE: ",".join(self.addresses),
            MEETING_VARIABLE: f"{self.run} {self.machine} {len(self.addresses)} {self.address} {self.key}",
        }


def worker_environment(
    devices: Devices, run_dir: Path, environment: Mapping[str, str], place: Place | None = None
) -> dict[str, str]:
    """The environment of a pool's processes: that of `environment`, less a denylist, plus what the workers need. Raises
    DeviceError where a GPU is none of this machine's."""
    env = inherited(environment, PACKAGE_ROOT)
    env[RUN_DIR_VARIABLE] = str(run_dir)
    env[PARENT_VARIABLE] = str(os.getpid())
    env["FASTUSP_DEVICE_TYPE"] = devices.type
    env |= _LOOPBACK
    if place is not None:
        env |= place.environment()
    if MODELS_VARIABLE in environment:
        env[MODELS_VARIABLE] = environment[MODELS_VARIABLE]
    env["TMPDIR"] = str(run_dir)  # goes with all that is in it, sockets of torch's symmetric memory too
    env["CUDA_VISIBLE_DEVICES"] = cuda_visible(devices)
    if not devices.gpus:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices.ranks)))
        # Ranks, host and others share the cores: threads that spin while they wait take them from those that work.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif devices.ranks > 1:
        env.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, which comes too late for forks of it
    return env


class Processes:
    """Starts torchrun at once, in a run directory, with a rank per device. place: of several machines.

    torchrun: its process, None where it could not be started.
    """

    def __init__(self, devices: Devices, directory: Path, place: Place | None = None):
        self.torchrun: subprocess.Popen | None = None
        self._devices, self._directory, self._place = devices, directory, place
        self._not_started: OSError | None = None
        self._killed = False
        self._started = threading.Event()
        self._ended = threading.Event()
        # Linux sends the parent-death signal when the *thread* that started a child ends, so one thread starts
        # torchrun and stays until it has ended.
        threading.Thread(target=self._supervise, name=f"fastusp {devices}", daemon=True).start()
        self._started.wait()

    def _supervise(self) -> None:
        directory = self._directory
        command = [sys.executable, "-m", "fastusp_backend.worker.launch"]
        command += [
            f"--nnodes={len(self._place.addresses) if self._place else 1}",
            f"--node-rank={self._place.machine if self._place else 0}",
            f"--nproc-per-node={self._devices.ranks}",
            "--max-restarts=0",
            "--monitor-interval=0.1",
        ]
        command += [f"--rdzv-id={directory.name}", f"--log-dir={directory / 'ranks'}", "--redirects=3"]
        command += ["-m", "fastusp_backend.worker"]
        try:
            with open(directory / "torchrun.log", "wb") as output:
                self.torchrun = subprocess.Popen(
                    command,
                    cwd=directory,
                    env=worker_environment(self._devices, directory, os.environ, self._place),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._started.set()
            self.torchrun.wait()
        except OSError as error:
            self._not_started = error
        finally:
            self._ended.set()
            self._started.set()

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def wait_until_ended(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def kill(self, ranks: Sequence[int]) -> None:
        """Ends all processes at once: the ranks, whose processes these are, die with torchrun."""
        if self.torchrun is not None and self.alive:
            self._killed = True
            self.torchrun.send_signal(signal.SIGKILL)
            self._ended.wait(10)
        # Ranks are not our children: wait, briefly, until the kernel has ended them, so that no caller meets one.
        deadline = time.monotonic() + 5
        for pid in ranks:
            while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
                time.sleep(0.01)

    def cause(self, model: ModelSpec | None) -> str:
        """Why they ended. model: that of the last request."""
        return self.ranked_cause(model)[1]

    def ranked_cause(self, model: ModelSpec | None) -> tuple[int, str]:
        """`cause`, as the function of this name has it."""
        if self.torchrun is None:
            return 0, f"torchrun could not be started: {self._not_started}"
        return ranked_cause(self._directory, self.torchrun, self._killed, model)
