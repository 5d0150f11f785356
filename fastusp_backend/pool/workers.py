"""Worker processes from their start to their end: torchrun as a child, its control channel, and why it ended."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from pathlib import Path

from ..config import Layout, ModelSpec
from ..devices import Devices, cuda_visible
from ..environment import inherited
from ..errors import PoolError, ProtocolError
from ..prompt import Tensors
from ..protocol import (
    VERSION,
    Cancel,
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
from .cause import find_cause, full_disk, last_log_lines
from .hangs import LOOK_SECONDS, Awaited, HangDetector
from .link import POLL_SECONDS, Link
from .rundir import RunDir
from .sent import SentPatches, SentTensors

log = logging.getLogger(__name__)

DEATH_SECONDS = 8.0
"""How long processes may take to end when one of them has."""
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "=lo",
    "NCCL_SOCKET_FAMILY": "AF_INET",  # NCCL leaves out the loopback interface's other address
    "NCCL_RAS_ENABLE": "0",  # what answers questions about NCCL's state, to whoever asks
}
"""A pool's ranks share a host: what they open listens there alone, whatever their host uses for other jobs."""


def worker_environment(devices: Devices, run_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a pool's processes: that of `environment`, less a denylist, plus what the workers need. Raises
    DeviceError where a GPU is none of this machine's."""
    env = inherited(environment, PACKAGE_ROOT)
    env[RUN_DIR_VARIABLE] = str(run_dir)
    env[PARENT_VARIABLE] = str(os.getpid())
    env["FASTUSP_DEVICE_TYPE"] = devices.type
    env |= _LOOPBACK
    env["TMPDIR"] = str(run_dir)  # goes with all that is in it, sockets of torch's symmetric memory too
    # torch's own choice, a folder of /tmp, may be another user's: it holds code, and pickles.
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run_dir.parent / "torchinductor"))
    env["CUDA_VISIBLE_DEVICES"] = cuda_visible(devices)
    if not devices.gpus:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices.ranks)))
        # Ranks, host and others share the cores: threads that spin while they wait take them from those that work.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


class Workers:
    """Starts the processes at once and returns. Threads of its own connect to them and watch over them: workers that
    hang are ended.

    ready: what they said when they were ready, None before.
    layout, model: those of the last request.
    sent, answered: the last request or order that went to them, and the last one that they answered, in order.
    held: what they last said to hold.
    tensors, patches: what they were sent and have, for the caller whose turn it is.
    """

    def __init__(self, devices: Devices):
        """Raises DeviceError where one does not exist."""
        cuda_visible(devices)
        self.devices = devices
        self.run_dir = RunDir()
        self.ready: Ready | None = None
        self.layout: Layout | None = None
        self.model: ModelSpec | None = None
        self.sent = self.answered = 0
        self.held: Held | None = None
        self.tensors, self.patches = SentTensors(), SentPatches()
        self._ids = itertools.count(1)
        self.channel: Channel | None = None
        self._link: Link | None = None
        self._behind = 0  # the last request or order whose answer nobody waits for
        self._unread = 0  # the last evaluation: its answer says that its tensors were read
        self._refused = False  # a message, and perhaps memory that came with it
        self._hangs = HangDetector(self.run_dir.path, devices.ranks)
        self._condemned = False  # they are being asked where they are, and answer nothing else any more
        self._why: str | None = None  # this process ended them
        self._where: list[str] = []
        self._process: subprocess.Popen | None = None
        self._not_started: OSError | None = None
        self._killed = False
        self._started = threading.Event()
        self._ended = threading.Event()
        # Linux sends the parent-death signal when the *thread* that started a child ends, so one thread starts
        # torchrun and stays until it has ended.
        for work in (self._supervise, self._connect, self._guard):
            threading.Thread(target=work, name=f"fastusp {devices}", daemon=True).start()
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
        command += [f"--rdzv-id={directory.name}", f"--log-dir={directory / 'ranks'}", "--redirects=3"]
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
        except OSError as error:
            self._not_started = error
        finally:
            self._ended.set()
            self._started.set()

    def _connect(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            channel = None
            try:
                channel = Channel.connect(self.run_dir.address, ToClient)
                channel.authenticate(self.run_dir.key, listens=False)
                channel.send(Hello(version=VERSION))
                reply, _ = channel.receive()
                if not isinstance(reply, Ready) or reply.version != VERSION:
                    raise ProtocolError(str(reply))
            except ProtocolError as error:
                channel.close()
                self._end(f"they speak another protocol version: {error}; restart ComfyUI")
            except (EOFError, OSError, AuthenticationError):  # not yet, or they are ending
                if channel is not None:
                    channel.close()
            else:
                self._link = Link(channel, self._hear)
                self.channel, self.ready = channel, reply
                if not self.alive:
                    self._link.close()  # perhaps after `dispose`
                who, seconds = f"{self.devices} ({', '.join(reply.devices)})", time.monotonic() - began
                log.info("FastUSP: the workers on %s are ready, %.1f s after their start", who, seconds)
                return

    def _guard(self) -> None:
        try:
            while not self._ended.wait(LOOK_SECONDS):
                if (suspicion := self._hangs.look(self._awaited)) is not None:
                    self._condemned = True
                    self._end(*self._hangs.accuse(suspicion))
        except Exception as error:
            log.exception("the FastUSP workers on %s cannot be watched any more", self.devices)
            self._end(f"they could not be watched any more ({type(error).__name__}: {error})")

    @property
    def _awaited(self) -> Awaited | None:
        if self.ready is None:
            return "start"
        if self.behind:
            return "end of what was left behind"
        return "answer" if self.sent > self.answered else None

    def _hear(self, message: Message) -> None:
        if isinstance(message, Held):
            self.held = message
        elif isinstance(message, Failed) and message.id is None:
            self._refused = True
        elif isinstance(message, Done | Failed):
            self.answered = max(self.answered, message.id)

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def behind(self) -> bool:
        """Whether they are still at a request or order whose answer nobody waits for, or about to end."""
        return self._condemned or (self._behind > self.answered and not self._link.ended)

    def leave_behind(self, number: int) -> None:
        """Nobody waits any more for the answer to this request or order."""
        self._behind = number

    def stop_forgotten(self) -> None:
        """Cancels and leaves behind what nobody waits for though nobody has said so: an interrupt may come anywhere in
        its caller, also where it cancels."""
        if self.alive and self.sent > self.answered and not self.behind:
            self.post(Cancel(id=self.sent))
            self.leave_behind(self.sent)

    def next_id(self) -> int:
        """The number of a request or order to come."""
        return next(self._ids)

    def send(
        self, message: Message, tensors: Tensors | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Sends a request or an order to workers that are ready, as `Link.send`. An evaluation's tensors lie where the
        last one's did, as soon as those were read."""
        evaluates = isinstance(message, Evaluate)
        if isinstance(message, Evaluate | Sample):
            self.layout = message.layout
        if isinstance(message, Evaluate | Sample | Patch):
            self.model = message.model
        if isinstance(message, Release | Unmap) or (evaluates and (self._refused or self._unread > self.answered)):
            self.channel.forget()
            self._refused = False
        if isinstance(message, Release):  # now: whether it arrives may not be seen
            self.tensors.doubt()
            self.patches.unload()
        frame = self.channel.frame(message, tensors, lasting=evaluates)
        if evaluates:
            self._unread = message.id
        self.sent = message.id
        self._link.send(frame, meanwhile)

    def post(self, message: Message) -> None:
        """Sends what is not answered, when those before it have been taken."""
        self._link.post(self.channel.frame(message))

    def receive(self, seconds: float) -> tuple[Message, Tensors] | None:
        """As `Link.receive`; of workers that are about to end, nothing counts."""
        received = self._link.receive(seconds)
        if self._condemned:
            raise EOFError
        return received

    def wait_until_ended(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def give_up(self) -> None:
        """Ends processes that should have answered, or ended by themselves; `failure` then tells where they were."""
        if self.alive:
            self._end(None, self._hangs.where())

    def _end(self, why: str | None, where: Sequence[str] = ()) -> None:
        """Ends all processes. why: None where they may tell it themselves; where: lines that say where they were."""
        self._why, self._where = why, [*where]
        self.kill()

    def kill(self) -> None:
        """Ends all processes at once: the ranks die with torchrun."""
        if self._process is not None and self.alive:
            self._killed = True
            self._process.send_signal(signal.SIGKILL)
            self._ended.wait(10)
        self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        """Ranks are not our children: wait, briefly, until the kernel has ended them, so that no caller meets one."""
        deadline = time.monotonic() + 5
        for pid in self.ready.pids if self.ready else ():
            while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
                time.sleep(0.01)

    def dispose(self, why: str | None = None) -> None:
        """Kills what still runs and removes all traces. why: for a prompt that it is taken from."""
        if self.alive:
            self._why = self._why or why
        self.kill()
        if self._link is not None:
            self._link.close()
        self._hangs.close()
        self.run_dir.remove()

    def failure(self, event: str) -> PoolError:
        """Why the workers ended: the rank that failed first, its error or signal, and the last log lines. Waits for
        torchrun's own account of it, and ends workers that do not end by themselves."""
        if not self.wait_until_ended(DEATH_SECONDS):
            self.give_up()
        directory = self.run_dir.path
        if self._process is None:
            cause = f"torchrun could not be started: {self._not_started}"
        else:
            cause = self._why or find_cause(directory, self._process, self._killed, self.model)
        cause += full_disk(directory)
        text = f"The FastUSP workers on {self.devices} {event}: {cause}. The next prompt starts new ones."
        log_lines = [f"  {line}" for line in last_log_lines(directory)]
        return PoolError("\n".join([text, *self._where, *["Last log lines:"][: len(log_lines)], *log_lines]))
