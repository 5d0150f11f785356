"""A pool of workers for one list of devices, warm between requests, had anew after a failure: processes that it starts
here, or those of a server."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..devices import Devices, ServerDevices
from ..errors import PoolError
from ..protocol import Held, Park, Release, Unmap
from .account import Account
from .attached import AttachedWorkers
from .contact import Contact
from .link import POLL_SECONDS
from .log import WorkerLog
from .progress import QUIET, Progress
from .request import NotSent, follow
from .workers import Workers

T = TypeVar("T")

log = logging.getLogger(__name__)

KEPT_BYTES = 512 << 20
"""Shared memory that stays between sampling runs: the residuals of a ControlNet for FLUX.1 at 1024 x 1024 take 377
MB."""
SHUTDOWN_SECONDS = 10.0
"""How long workers may take to end by themselves when their pool is closed."""


class Pool:
    """Workers for `devices`. Processes start with `start` or the first request; requests run one at a time."""

    def __init__(self, devices: Devices, start: Callable[[Devices, Callable[[], None]], Contact] | None = None):
        """start: gives workers for the devices, in place of those of this machine or of a server."""
        self.devices = devices
        self._start = start
        self.starts = 0
        """How often processes were started."""
        self.crowded = False
        """Whether weights that were unpacked had to leave, for a request or for others: they are not unpacked again."""
        self._account = Account()
        self._log = WorkerLog()
        self._first_line = 0  # of those that the last workers write
        self._workers: Contact | None = None
        self._turn_lock = threading.Lock()
        self._running = False
        self._lifecycle_lock = threading.Lock()
        self._closed = False
        self.changed: Callable[[], None] = lambda: None
        """Called, on a thread of its own, when the processes are ready, and when they have ended; not in a run, which
        hears of it itself."""
        _pools.add(self)

    def start(self) -> Contact:
        """Starts the processes, if none run, without waiting for them. What failed ones left is removed."""
        with self._lifecycle_lock:
            if self._closed:
                raise PoolError(
                    f"Restart ComfyUI: it is shutting down, and the FastUSP pool on {self.devices} was closed"
                )
            if self._workers is not None and self._workers.alive:
                return self._workers
            if self._workers is not None:
                self._dispose(self._workers)
            _, self._first_line = self._log.since(0)
            kind = AttachedWorkers if isinstance(self.devices, ServerDevices) else Workers
            self._workers = (self._start or kind)(self.devices, self._tell)
            self.starts += 1
            return self._workers

    def run(self, work: Callable[[Contact], T], progress: Progress = QUIET) -> T:
        """Gives the result of work(workers), which submits requests, in this caller's turn: nobody else sends the
        workers anything meanwhile. Where they turn out to have died since they were last used, new ones are started,
        and `work` is called again, for those.

        Raises what `work` does; Cancelled or PoolError where it comes to no call of it.
        """
        with self._turn(progress):
            while True:
                starts, workers = self.starts, self._ready_workers(progress)
                try:
                    result = work(workers)
                except NotSent as unsent:
                    failure = workers.failure("stopped before a prompt ran")
                    if self.starts > starts:
                        raise failure from unsent.__cause__
                    log.warning("%s", failure)
                else:
                    self._account.ended_well()
                    return result

    def release(self) -> None:
        """Drops the resident model on all ranks; the processes stay warm. Does nothing where none run. Raises PoolError
        where they died, or hang."""
        self._order(Release)

    def park(self) -> None:
        """Moves the resident model to host memory, from where its next request fetches it. Does nothing where there is
        none. Raises as `release`."""
        held = self.held
        if held is not None and held.state == "resident" or self._still_at_what_was_left():
            self._order(Park)

    def unmap(self) -> None:
        """Gives back the memory in which evaluations' tensors travel, where it is more than is worth keeping. Raises as
        `release`."""
        workers = self._workers
        if workers is not None and workers.channel is not None and workers.channel.lasting_bytes > KEPT_BYTES:
            self._order(Unmap)

    @property
    def held(self) -> Held | None:
        """What the workers last said of their weights; None where they have said nothing yet, or none run."""
        workers = self._workers
        return workers.held if workers is not None and workers.alive else None

    @property
    def busy(self) -> bool:
        """Whether a request runs. Between the requests of a run none does: weights may leave then, and the next request
        fetches them."""
        return self._running

    def sampling(self, **about) -> contextlib.AbstractContextManager[None]:
        """A run of several requests: `status` says `busy` from its beginning to its end, also between them, and keeps
        `about` with what it took."""
        return self._account.run(about)

    def stepped(self, index: int, total: int, seconds: float | None, *, cached: bool = False) -> None:
        """For who steps himself by evaluations: step `index` of `total` is done. seconds: None where they are not
        known. cached: whether steps may be skipped."""
        self._account.stepped(index, total, seconds, cached=cached)

    def following(self, progress: Progress, *, cached: bool = False) -> Progress:
        """Returns a progress by which `status` also tells how far a request is. cached: whether steps may be
        skipped."""
        return self._account.following(progress, cached=cached)

    def _tell(self) -> None:
        if not (self._closed or self.busy or self._account.sampling):
            self.changed()

    def _still_at_what_was_left(self) -> bool:
        """Whether the workers still work on a request that was left behind: it may yet load the weights."""
        workers = self._workers
        return workers is not None and workers.alive and workers.behind

    def _order(self, kind: type[Release] | type[Park] | type[Unmap]) -> None:
        """Has workers that are ready do something with what they have."""
        with self._turn(QUIET):
            workers = self._workers
            if workers is None or not workers.alive or workers.ready is None:
                return
            order = kind(id=workers.next_id())
            try:
                if workers.behind:  # they come to it after what was given up: nobody should wait for that
                    workers.leave_behind(order.id)
                    workers.send(order)
                else:
                    workers.send(order)
                    follow(workers, order.id, QUIET)
            except (OSError, EOFError) as error:
                raise workers.failure("stopped while no prompt ran") from error

    @contextlib.contextmanager
    def _turn(self, progress: Progress) -> Iterator[None]:
        with progress.acquired(self._turn_lock), self._account.request():
            self._running = True
            try:
                if self._workers is not None:
                    self._workers.stop_forgotten()
                yield
            finally:
                self._running = False

    def abandon(self, event: str) -> PoolError:
        """Ends workers that the caller takes for hung; the error says why, with their last log lines. The next call
        starts new ones."""
        workers = self._workers
        if workers is None:
            return PoolError(f"The FastUSP workers on {self.devices} {event}")
        workers.give_up()
        error = workers.failure(event)
        self._account.error = str(error)
        return error

    def status(self) -> dict:
        """What people want to know: devices, state (`off`, `starting`, `idle`, `busy`, `stopping`: at what was
        cancelled), processes and the model that they hold; of the last request the layout and the options that are not
        the default; memory, as `Workers.memory`; how far a request is, as `Activity.facts`; history, as `Account`'s;
        last_line: what workers that start have written last; error: the last one's text, until a request succeeds."""
        workers = self._workers
        alive = workers is not None and workers.alive
        ready = workers.ready if workers is not None else None
        busy = self.busy or self._account.sampling
        state = "off"
        if alive:
            state = "starting" if ready is None else "stopping" if workers.behind else "busy" if busy else "idle"
        status = {
            "devices": str(self.devices),
            "gpus": list(self.devices.gpus),
            "ranks": self.devices.ranks,
            "state": state,
            "starts": self.starts,
            "history": list(self._account.history),
        }
        if state == "starting" and (line := self._last_line()):
            status["last_line"] = line
        if ready is not None:
            status |= {"names": ready.devices, "torch": ready.torch, "backend": ready.backend} | workers.last_request()
            if alive:
                status |= {"pids": ready.pids, "memory": workers.memory()}
        if held := self.held:
            status |= {"held": held.state, "nbytes": held.nbytes, "transport": held.transport, "weights": held.weights}
            status["model"] = os.path.basename(held.model.path) if held.model else None
        if (activity := self._account.activity) is not None:
            status |= activity.facts()
        if self._account.error is None and workers is not None and not alive and not busy:
            self._account.error = str(workers.failure("stopped"))  # nobody has asked them for anything since
        if self._account.error is not None:
            status["error"] = self._account.error
        return status

    def _last_line(self) -> str:
        """The last that the present workers have written; empty before there is any."""
        lines, _ = self.log_since(self._first_line)
        return lines[-1] if lines else ""

    def log_since(self, number: int) -> tuple[list[str], int]:
        """What the workers have written, those before them too: the lines from `number` on, of the newest
        `log.LINES`, and the number of the next one."""
        if (workers := self._workers) is not None:
            workers.write_log(self._log)
        return self._log.since(number)

    def stop(self, why: str) -> None:
        """Ends the processes, if any run; the next request starts new ones. why: for a prompt that it is taken from."""
        with self._lifecycle_lock:
            workers, self._workers = self._workers, None
        self._end(workers, why)

    def close(self) -> None:
        """Ends the processes and removes all their traces. May be called twice; no request can follow."""
        with self._lifecycle_lock:
            self._closed = True
            workers, self._workers = self._workers, None
        self._end(workers, "the pool was closed")

    def _end(self, workers: Contact | None, why: str) -> None:
        if workers is None:
            return
        if workers.ready is not None and workers.alive and self._turn_lock.acquire(blocking=False):
            try:
                workers.part(SHUTDOWN_SECONDS)
            finally:
                self._turn_lock.release()
        self._dispose(workers, why)

    def _dispose(self, workers: Contact, why: str | None = None) -> None:
        workers.write_log(self._log)
        workers.dispose(why)

    def _ready_workers(self, progress: Progress) -> Contact:
        """Workers that are free: those that hang at what was stopped are replaced."""
        while True:
            workers = self.start()
            starting = workers.ready is None
            if starting:
                progress.phase(workers.beginning)
            elif workers.behind:
                progress.phase("waiting for the workers")
            else:
                return workers
            while workers.alive and (workers.ready is None or workers.behind):
                progress.go_on()
                time.sleep(POLL_SECONDS)
            if not workers.alive:
                failure = workers.failure("did not start" if starting else "stopped before a prompt ran")
                if starting:
                    raise failure
                log.warning("%s", failure)


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()
