"""A pool of worker processes for one list of devices, warm between requests, started anew after a failure."""

import atexit
import contextlib
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

from ..devices import Devices
from ..errors import Cancelled, FastUSPError, PatchesLost, PoolError, ProtocolError, RequestError
from ..protocol import Cancel, Done, Failed, Held, Message, Park, Phase, Release, Shutdown, Step, Unmap
from .account import Account
from .kept import KeptTensors, Tensors
from .patches import HeldPatches
from .progress import QUIET, CallersOwn, Progress, call
from .workers import Workers

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
START_SECONDS = 300.0
DEATH_SECONDS = 8.0
CANCEL_SECONDS = 5.0
"""How long a cancel waits for its answer. Loading and compiling do not hear it: the request is then left behind, and
its late replies are dropped."""
ORDER_SECONDS = 120.0
"""How long idle workers may take to drop or park their weights; those that take longer are taken for hung."""
HANG_SECONDS = 300.0
"""Workers that have not answered for so long since a request was left behind are taken for hung, at the next cancel."""

KEPT_BYTES = 512 << 20
"""Shared memory that stays between sampling runs: the residuals of a ControlNet for FLUX.1 at 1024 x 1024 take 377
MB."""


class Pool:
    """Workers for `devices`. Processes start with `start` or the first request; requests run one at a time."""

    def __init__(self, devices: Devices):
        self.devices = devices
        self.generation = 0
        """How often processes were started."""
        self.epoch = 0
        """Changes whenever the workers have forgotten what they were given."""
        self.kept = KeptTensors()
        self.patches = HeldPatches()
        self._account = Account()
        self._workers: Workers | None = None
        self._ids = itertools.count(1)
        self._busy = threading.Lock()
        self._running = False
        self._state = threading.Lock()
        self._closed = False
        _pools.add(self)

    def start(self) -> Workers:
        """Starts the processes, if none run, without waiting for them. What a failed generation left is removed."""
        with self._state:
            if self._closed:
                raise PoolError(f"the FastUSP pool on {self.devices} was closed")
            if self._workers is not None and self._workers.alive:
                return self._workers
            if self._workers is not None:
                self._workers.dispose()
            self._workers = Workers(self.devices)
            self.generation += 1
            self.epoch += 1
            return self._workers

    def run(
        self,
        make: Callable[[int], Message],
        tensors: Tensors,
        progress: Progress = QUIET,
    ) -> Tensors:
        """Submits make(id) and waits for its result.

        Raises Cancelled, RequestError (refused; the pool goes on) or PoolError (the workers died; the next call
        starts new ones).
        """
        with self._turn():
            number = next(self._ids)
            workers = self._submit(make(number), tensors, progress)
            try:
                result = self._follow(workers, number, progress)
                self._account.error = None
                return result
            except CallersOwn as own:
                self._cancel(workers, number)
                raise own.error from own.error.__cause__
            except (OSError, EOFError) as error:
                raise self._failed(workers, "stopped while a prompt ran") from error
            except ProtocolError:
                self._cancel(workers, number)  # one message was refused, but the request may run
                raise
            except FastUSPError:
                raise
            except BaseException:
                self._cancel(workers, number)  # Ctrl-C: the ranks must stop as well
                raise

    def release(self) -> None:
        """Drops the resident model on all ranks; the processes stay warm. Does nothing where none run. Raises PoolError
        where they died, or hang."""
        if self._order(Release):
            self.epoch += 1

    def park(self) -> None:
        """Moves the resident model to host memory, from where its next request fetches it. Does nothing where there is
        none. Raises as `release`."""
        held = self.held
        if held is not None and held.state == "resident" or self._comes_to_it():
            self._order(Park)

    def unmap(self) -> None:
        """Gives back the memory in which evaluations' tensors travel, where it is more than is worth keeping. Raises as
        `release`."""
        workers = self._workers
        if workers is not None and workers.channel is not None and workers.channel.lasting_bytes > KEPT_BYTES:
            self._order(Unmap)

    @property
    def held(self) -> Held | None:
        """What the workers hold; None where they have not held anything yet, or none run."""
        workers = self._workers
        if workers is None or not workers.alive:
            return None
        if workers.left_behind is not None:
            self._hear_out(workers)
        return workers.held

    @property
    def busy(self) -> bool:
        """Whether a request runs. Between the requests of a run none does: weights may leave then, and the next request
        fetches them."""
        return self._running

    def sampling(self) -> contextlib.AbstractContextManager[None]:
        """A run of several requests: `status` says `busy` from its beginning to its end, also between them."""
        return self._account.run()

    def _comes_to_it(self) -> bool:
        """Whether the workers are still at a request that was left behind: weights may come with it."""
        workers = self._workers
        return workers is not None and workers.alive and workers.left_behind is not None

    def _order(self, kind: type[Release] | type[Park] | type[Unmap]) -> bool:
        """Has workers that stand do something with what they hold; whether any stood."""
        with self._turn():
            workers = self._workers
            if workers is None or not workers.alive or workers.channel is None:
                return False
            number = next(self._ids)
            try:
                workers.send(kind(id=number))
                if workers.left_behind is not None:
                    workers.left_behind = number  # they come to it after what was given up: nobody should wait for that
                else:
                    self._follow(workers, number, QUIET, ORDER_SECONDS)
            except (OSError, EOFError) as error:
                raise self._failed(workers, "stopped while no prompt ran") from error
            return True

    def _hear_out(self, workers: Workers) -> None:
        """Takes in what workers have said since a request was left behind: they may have loaded its model."""
        if not self._busy.acquire(blocking=False):
            return  # whoever has the turn listens
        try:
            while workers.channel.poll(0):
                workers.receive()
        except (OSError, EOFError, ProtocolError) as error:
            log.warning("the FastUSP workers on %s were not understood: %s", self.devices, error)
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._busy, self._account.request():
            self._running = True
            try:
                yield
            finally:
                self._running = False

    def abandon(self, event: str) -> PoolError:
        """Ends workers that the caller takes for hung; the error says why, with their last log lines. The next call
        starts new ones."""
        workers = self._workers
        if workers is None:
            return PoolError(f"The FastUSP workers on {self.devices} {event}")
        error = workers.failure(event)
        self._account.error = str(error)
        workers.kill()
        return error

    def status(self) -> dict:
        """What people want to know: devices, state (`off`, `starting`, `idle`, `busy`), processes, the model; error:
        the last one's text, until a request succeeds."""
        workers = self._workers
        alive = workers is not None and workers.alive
        ready = workers.ready if alive else None
        busy = self.busy or self._account.sampling
        state = "off" if not alive else "starting" if not workers.standing else "busy" if busy else "idle"
        status = {
            "devices": str(self.devices),
            "ranks": self.devices.ranks,
            "state": state,
            "generation": self.generation,
        }
        if ready is not None:
            status |= {"pids": ready.pids, "names": ready.devices, "torch": ready.torch, "transport": ready.transport}
            status["layout"] = str(workers.layout) if workers.layout else None
        if held := self.held:
            status |= {"held": held.state, "nbytes": held.nbytes, "exchanges": held.exchanges}
            status["model"] = os.path.basename(held.model.path) if held.model else None
        if self._account.error is None and workers is not None and not alive:
            self._account.error = str(workers.failure("stopped"))  # nobody has asked them for anything since
        if self._account.error is not None:
            status["error"] = self._account.error
        return status

    def close(self) -> None:
        """Ends the processes and removes all their traces. May be called twice; no request can follow."""
        with self._state:
            self._closed = True
            workers, self._workers = self._workers, None
        if workers is None:
            return
        if workers.channel is not None and workers.alive and self._busy.acquire(blocking=False):
            try:
                workers.channel.send(Shutdown())
                workers.wait_until_ended(5)
            except OSError:
                pass  # they are ending already
            finally:
                self._busy.release()
        workers.dispose()

    def _submit(self, message: Message, tensors: Tensors, progress: Progress) -> Workers:
        """Sends to workers that stand; where these turn out to have died since they were last used, to new ones, which
        may refuse what relies on things that the old ones held."""
        while True:
            generation, workers = self.generation, self._standing_workers(progress)
            try:
                workers.send(message, tensors)
                return workers
            except OSError as error:
                failed = self._failed(workers, "stopped before a prompt ran")
                if self.generation > generation:
                    raise failed from error
                log.warning("%s", failed)

    def _standing_workers(self, progress: Progress) -> Workers:
        workers = self.start()
        if workers.ready is not None:
            return workers
        progress.phase(f"starting {self.devices.ranks} worker(s) on {self.devices}")
        deadline = time.monotonic() + START_SECONDS
        while not workers.try_connect():
            if progress.interrupted():
                raise Cancelled("interrupted while the workers started")
            if time.monotonic() > deadline:
                error = workers.failure(f"did not start within {START_SECONDS:.0f} s")
                workers.kill()
                raise error
            time.sleep(POLL_SECONDS)
        seconds, names = time.monotonic() - workers.began, ", ".join(workers.ready.devices)
        log.info("FastUSP: the workers on %s (%s) are ready, %.1f s after their start", self.devices, names, seconds)
        return workers

    def _follow(self, workers: Workers, number: int, progress: Progress, seconds: float = math.inf) -> Tensors:
        cancelled_at, started = None, time.monotonic()
        while True:
            if cancelled_at is None and call(progress.interrupted):
                workers.channel.send(Cancel(id=number))
                cancelled_at = time.monotonic()
            if not workers.channel.poll(POLL_SECONDS):
                if not workers.alive:
                    raise self._failed(workers, "stopped while a prompt ran")
                if cancelled_at is not None and time.monotonic() - cancelled_at > CANCEL_SECONDS:
                    self._leave_behind(workers, number)
                if time.monotonic() - started > seconds:
                    raise self._failed(workers, f"did not answer within {seconds:.0f} s")
                continue
            message, tensors = workers.receive()
            if isinstance(message, Failed) and message.id is None:
                raise ProtocolError(f"the workers refused a message: {message.text}")
            if message.id != number or isinstance(message, Held):
                continue  # the reply of a request that was given up, or what `receive` saw to
            if isinstance(message, Step):
                if cancelled_at is None:
                    call(progress.step, message, tensors)
            elif isinstance(message, Phase):
                call(progress.phase, message.text)
            elif isinstance(message, Done):
                return tensors
            elif message.kind == "cancelled":
                raise Cancelled(f"request {number} was cancelled")
            elif message.kind == "out_of_memory":
                device = workers.ready.devices[message.rank]
                raise RequestError(f"rank {message.rank} ({device}) ran out of memory {message.text}")
            else:
                raise (PatchesLost if message.kind == "unpatched" else RequestError)(message.text)

    def _cancel(self, workers: Workers, number: int) -> None:
        """Cancels and waits for the end, so that the next request finds the ranks free."""
        try:
            self._follow(workers, number, Progress(interrupted=lambda: True))
        except (FastUSPError, OSError, EOFError):
            pass  # ended, one way or another; the caller's exception is what is raised

    def _leave_behind(self, workers: Workers, number: int) -> NoReturn:
        """Raises Cancelled for a request that has not answered; PoolError, ending the workers, if they seem hung."""
        now = time.monotonic()
        if workers.left_behind is None:
            workers.silent_since = now
        elif now - workers.silent_since > HANG_SECONDS:
            raise self._failed(workers, f"did not answer for {HANG_SECONDS:.0f} s")
        workers.left_behind = number
        raise Cancelled(f"request {number} was cancelled; the workers will come to it")

    def _failed(self, workers: Workers, event: str) -> PoolError:
        """The error for workers that ended or must end; waits for torchrun's own account of it."""
        if not workers.wait_until_ended(DEATH_SECONDS):
            workers.kill()
        return workers.failure(event)


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()
