"""Workers without processes: what ranks make of requests, in this process, and what may go wrong on the way."""

import queue
import threading
from types import SimpleNamespace

import torch
from support import SOME_FILE

from fastusp_backend.config import Layout, ModelSpec, Settings, WeightPatch
from fastusp_backend.pool import NO_PATCHES, Progress, WeightPatches, name_of
from fastusp_backend.pool.progress import QUIET
from fastusp_backend.pool.session import Session
from fastusp_backend.pool.workers import Workers
from fastusp_backend.prompt import Prompt
from fastusp_backend.protocol import VERSION, Cancel, Done, Evaluate, Failed, Patch, Ready, Release, Sample, Shutdown


class FakeProcesses:
    """In the place of `Processes`."""

    def __init__(self, devices, directory, place=None):
        self._ended = threading.Event()
        self.wait_until_ended = self._ended.wait

    @property
    def alive(self):
        return not self._ended.is_set()

    def kill(self, ranks):
        self._ended.set()

    def cause(self, model):
        return "they were told to"

    def ranked_cause(self, model):
        return 0, self.cause(model)


class FakeWorkers(Workers):
    """`Workers` whose ranks are a `Rank`. script: how the next requests fare, in order; those after them are served.

    served: also where it is said next.
    gone: the workers have died before it.
    dies: they die of it.
    refused, unpatched, unkept: answered so, and not served.
    misread: its frame is refused.
    interrupted: Ctrl-C comes while it is sent.
    late: not answered until `Rank.catch_up`.
    """

    script: list[str] = []
    """Of whichever workers are alive."""

    def __init__(self, devices, changed=lambda: None):
        self.rank = Rank(self)
        super().__init__(devices, changed)

    def _connect(self):
        self.channel = SimpleNamespace(
            frame=lambda message, tensors=None, lasting=False: (message, dict(tensors or {})),
            forget=lambda: None,
            lasting_bytes=0,
        )
        self._link = self.rank
        self.ready = Ready(version=VERSION, devices=["cpu"], pids=[], torch="2", backend="gloo")

    def _guard(self):
        pass


class Rank:
    """In the place of a `Link`: does what it is sent at once.

    messages: all that came, with the names of their tensors.
    cancelled: the requests that were to be.
    kept, model, patches: what ranks have.
    """

    ended = False

    def __init__(self, workers: FakeWorkers):
        self._workers = workers
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        self._late: list[tuple] = []
        self.messages: list[tuple[object, set[str]]] = []
        self.cancelled: list[int] = []
        self.kept: dict[int, torch.Tensor] = {}
        self.model, self.patches = None, 0

    def sent(self, kind: type) -> list:
        return [message for message, _ in self.messages if isinstance(message, kind)]

    def send(self, frame, meanwhile):
        message, tensors = frame
        what = self._workers.script.pop(0) if self._workers.script else "served"
        if what == "gone":
            self._workers.kill()
            raise BrokenPipeError
        if what == "interrupted":
            raise KeyboardInterrupt
        self.messages.append((message, set(tensors)))
        if what == "dies":
            self._workers.kill()
            self._replies.put(EOFError())
        elif what == "misread":
            self._reply(Failed(id=None, kind="protocol", rank=0, text="no message"))
        elif what == "late":
            self._late.append(frame)
        elif what == "served":
            self._serve(message, tensors)
        else:
            self._reply(Failed(id=message.id, kind=what, rank=0, text=f"it was {what}"))

    def post(self, frame):
        message, _ = frame
        if isinstance(message, Shutdown):
            self._workers.kill()
        elif isinstance(message, Cancel):
            self.cancelled.append(message.id)
            if not self._late:  # it has ended, or never come
                self._reply(Failed(id=message.id, kind="cancelled", rank=0, text=""))

    def receive(self, seconds):
        try:
            item = self._replies.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self):
        pass

    def catch_up(self) -> None:
        """Comes to what was left behind."""
        while self._late:
            self._serve(*self._late.pop(0))

    def _reply(self, message, tensors=None):
        self._workers._hear(message)
        self._replies.put((message, tensors or {}))

    def _serve(self, message, tensors):
        if isinstance(message, Release):
            self.model, self.patches = None, 0
            self.kept.clear()
        elif isinstance(message, Patch):
            self._bring(message.model)
            if message.base not in (None, self.patches):
                self._reply(Failed(id=message.id, kind="unpatched", rank=0, text="another base"))
                return
            self.patches = message.number
        elif isinstance(message, Evaluate | Sample):
            if message.patches != (self.patches if self.model == message.model else 0):
                self._reply(Failed(id=message.id, kind="unpatched", rank=0, text="another set"))
                return
            self._bring(message.model)
            if isinstance(message, Evaluate):
                self._evaluate(message, tensors)
                return
        self._reply(Done(id=message.id), {"output": torch.zeros(1)})

    def _evaluate(self, message: Evaluate, tensors):
        for number in message.forget:
            self.kept.pop(number, None)
        assert not self.kept.keys() & message.keep.values(), "a number was given twice"
        self.kept |= {number: tensors[name].clone() for name, number in message.keep.items()}
        missing = [name for name, number in message.reuse.items() if number not in self.kept]
        if missing:
            self._reply(Failed(id=message.id, kind="refused", rank=0, text=f"not kept: {missing}"))
        else:
            used = {name: self.kept[number] for name, number in (message.keep | message.reuse).items()}
            self._reply(Done(id=message.id), {"output": used["context"]})

    def _bring(self, model):
        if model != self.model:
            self.model, self.patches = model, 0


SPEC = ModelSpec(path="/m", file=SOME_FILE, storage=None, compute="float32")
X = torch.zeros(1, 16, 4, 4)


def session(pool, patches: WeightPatches = NO_PATCHES, model: ModelSpec = SPEC) -> Session:
    return Session(pool, model, (Layout(ulysses=1, ring=1),), Settings(), patches)


def evaluate(pool, context: torch.Tensor, patches: WeightPatches = NO_PATCHES, progress: Progress = QUIET):
    """An evaluation, whose result is what the workers took for its context."""
    return session(pool, patches).evaluate(X, torch.ones(1), Prompt(context, torch.ones(1, 4)), progress)


def lora(*keys: str) -> WeightPatches:
    value = torch.ones(1)
    patch = WeightPatch(kind="set", tensors={"value": name_of(value)}, strength=1.0)
    return WeightPatches({key: (patch,) for key in keys}, {name_of(value): value})


def rank(pool):
    return pool._workers.rank


def script(*endings: str) -> None:
    FakeWorkers.script[:] = endings
