"""One generation of worker processes: torchrun as a child, its control channel, and why it ended."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client
from pathlib import Path

import torch

from ..config import Layout, ModelSpec
from ..devices import Devices, cuda_visible
from ..environment import inherited
from ..errors import PoolError
from ..protocol import (
    VERSION,
    Channel,
    Done,
    Evaluate,
    Failed,
    Held,
    Hello,
    Message,
    Patch,
    Ready,
    Release,
    Sample,
    Unmap,
)
from ..protocol.messages import ToClient
from ..worker.process import PARENT_VARIABLE, RUN_DIR_VARIABLE
from .rundir import RunDir
from .signals import cause_of

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 12
PRINTED_LINES = 1000
"""Of each file of printed lines, as many are looked through for warnings: NCCL_DEBUG=INFO prints hundreds."""
_ALARMING = re.compile(r"\b(WARN|WARNING|ERROR|FATAL)\b|[Ee]rror\b|Traceback|failed")


def worker_environment(devices: Devices, run_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a pool's processes: that of `environment`, less a denylist, plus what the workers need. Raises
    DeviceError where a GPU is none of this machine's."""
    env = inherited(environment, PACKAGE_ROOT)
    env[RUN_DIR_VARIABLE] = str(run_dir)
    env[PARENT_VARIABLE] = str(os.getpid())
    env["FASTUSP_DEVICE_TYPE"] = devices.type
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env["CUDA_VISIBLE_DEVICES"] = cuda_visible(devices)
    if not devices.gpus:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices.ranks)))
        # Ranks, host and others share the cores: threads that spin while they wait take them from those that work.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


class Workers:
    """Starts the processes at once and returns; `try_connect` says when they stand.

    began: when they were started, by time.monotonic. layout, model: of the last request. left_behind: the last request
    or order whose answer nobody waited for, until it comes. silent_since: when they last said something, or the first
    of those was left behind. held: what they last said to hold.
    """

    def __init__(self, devices: Devices):
        """Raises DeviceError where one does not exist."""
        cuda_visible(devices)
        self.devices = devices
        self.run_dir = RunDir()
        self.began = time.monotonic()
        self.ready: Ready | None = None
        self.layout: Layout | None = None
        self.model: ModelSpec | None = None
        self.left_behind: int | None = None
        self.silent_since = 0.0
        self.held: Held | None = None
        self.channel: Channel | None = None
        self._unread: int | None = None  # the last evaluation, until its answer says that its tensors were read
        self._process: subprocess.Popen | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        # Linux sends the parent-death signal when the *thread* that started a child ends, so one thread starts
        # torchrun and stays until it has ended.
        threading.Thread(target=self._supervise, name=f"fastusp {devices}", daemon=True).start()
        self._started.wait()

    def _supervise(self) -> None:
        directory = self.run_dir.path
        command = [sys.executable, "-m", "fastusp_backend.worker.launch"]
        command += [
            "--nnodes=1",
            f"--nproc-per-node={self.devices.ranks}",
            "--max-restarts=0",
            "--monitor-interval=0.1",
        ]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={directory.name}"]
        command += ["--local-addr=127.0.0.1", f"--log-dir={directory / 'ranks'}", "--redirects=3"]
        command += ["-m", "fastusp_backend.worker"]
        try:
            with open(directory / "torchrun.log", "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    cwd=directory,
                    env=worker_environment(self.devices, directory, os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._started.set()
            self._process.wait()
        finally:
            self._ended.set()
            self._started.set()

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def standing(self) -> bool:
        """Whether rank 0 listens, connected or not."""
        return self.alive and os.path.exists(self.run_dir.address)

    def try_connect(self) -> bool:
        """Whether the workers stand. Raises PoolError when they ended instead, or speak another version."""
        if self.channel is not None:
            return True
        if not self.alive:
            raise self.failure("did not start")
        try:
            connection = Client(self.run_dir.address, family="AF_UNIX", authkey=self.run_dir.key)
            channel = Channel(connection, ToClient)
            channel.send(Hello(version=VERSION))
            reply, _ = channel.receive()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (EOFError, OSError) as error:
            self.wait_until_ended(5)
            raise self.failure("ended while they started") from error
        if isinstance(reply, Failed) or not isinstance(reply, Ready) or reply.version != VERSION:
            channel.close()
            raise PoolError(f"the workers speak another protocol version: {reply}; restart ComfyUI")
        self.channel, self.ready = channel, reply
        return True

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """As `Channel.send`. An evaluation's tensors lie where the last one's did, as soon as those were read."""
        evaluates = isinstance(message, Evaluate)
        if isinstance(message, Evaluate | Sample):
            self.layout = message.layout
        if isinstance(message, Evaluate | Sample | Patch):
            self.model = message.model
        if isinstance(message, Release | Unmap) or (evaluates and self._unread is not None):
            self.channel.forget()
        if evaluates:
            self._unread = message.id
        self.channel.send(message, tensors, lasting=evaluates)

    def receive(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """The next message, as `Channel.receive`, with what it says of these workers taken down."""
        message, tensors = self.channel.receive()
        self.silent_since = time.monotonic()
        if isinstance(message, Held):
            self.held = message
        elif isinstance(message, Done | Failed) and message.id is not None:  # they answer in order
            if self.left_behind is not None and message.id >= self.left_behind:
                self.left_behind = None
            if self._unread is not None and message.id >= self._unread:
                self._unread = None
        return message, tensors

    def wait_until_ended(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def kill(self) -> None:
        """Ends all processes at once: the ranks die with torchrun."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGKILL)
            self._ended.wait(10)
        self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        """Ranks are not our children: wait, briefly, until the kernel has ended them, so that no caller meets one."""
        deadline = time.monotonic() + 5
        for pid in self.ready.pids if self.ready else ():
            while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
                time.sleep(0.01)

    def dispose(self) -> None:
        """Kills what still runs and removes all traces."""
        self.kill()
        if self.channel is not None:
            self.channel.close()
        self.run_dir.remove()

    def failure(self, event: str) -> PoolError:
        """Why the workers ended: the rank that failed first, its error or signal, and the last log lines."""
        cause = self._cause()
        lines = self._last_log_lines()
        log = "\nLast log lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
        return PoolError(
            f"The FastUSP workers on {self.devices} {event}: {cause}. The next prompt starts new ones.{log}"
        )

    def _cause(self) -> str:
        directory = self.run_dir.path
        exits = _read_json(directory / "exit.json") or []
        records = [r for path in directory.glob("failure-*.json") if (r := _read_json(path))]
        told = {record["rank"] for record in records}
        for failed in exits:
            if failed["exitcode"] < 0 and failed["exitcode"] != -signal.SIGTERM and failed["rank"] not in told:
                name = signal.Signals(-failed["exitcode"]).name
                cause = cause_of(name, self.model)
                return f"rank {failed['rank']} (process {failed['pid']}) was ended by {name}{cause}"
        if records:
            first = min(records, key=lambda r: (r["peer_lost"], r["time"]))
            return f"rank {first['rank']} failed with {first['text']}"
        if exits:
            return f"rank {exits[0]['rank']} ended with exit code {exits[0]['exitcode']}"
        if self.alive:
            return "its processes still run"
        code = self._process.returncode if self._process else None
        return f"torchrun ended with exit code {code}"

    def _last_log_lines(self) -> list[str]:
        directory = self.run_dir.path
        lines = []
        for line in _tail(directory / "pool.log"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # its writer died in the middle of it
            trace = record.get("trace", "").strip().splitlines()[-1:]
            lines.append(" ".join([f"[rank {record['rank']}] {record['level']}: {record['text']}", *trace]))
        if not lines:
            lines = _tail(directory / "torchrun.log")
        return lines + printed_lines(directory)


def printed_lines(directory: Path) -> list[str]:
    """What the ranks printed last (NCCL writes to stdout), in the order of ranks: of each as many lines as of the
    others, warnings and errors before anything else."""
    ranks: dict[int, list[str]] = {}
    for path in sorted(directory.glob("ranks/**/std*.log")):
        lines = [f"[rank {path.parent.name} {path.stem}] {line}" for line in _tail(path, PRINTED_LINES)]
        ranks.setdefault(int(path.parent.name), []).extend(lines)
    turns = []  # quiet, turn of its rank, rank, place
    for rank, lines in ranks.items():
        for quiet in (False, True):
            places = [n for n, line in enumerate(lines) if (_ALARMING.search(line) is None) == quiet]
            turns += [(quiet, turn, rank, place) for turn, place in enumerate(reversed(places))]
    chosen = sorted((rank, place) for _, _, rank, place in sorted(turns)[:LOG_LINES])
    return [ranks[rank][place] for rank, place in chosen]


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None  # absent, or its writer died in the middle of it


def _tail(path: Path, count: int = LOG_LINES) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
