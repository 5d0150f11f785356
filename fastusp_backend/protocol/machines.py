"""What the machines of one server say to each other; its first one is the server that clients attach to.

A *run* is the life of one set of workers, under a name of its own: a torchrun on each machine.
"""

from typing import Literal

from .messages import Failed, Message, ToServer, Welcome


class Join(Message):
    """Machine `machine` has `ranks` devices for runs, of which the server says when one begins. software: see
    `server.software.Software`."""

    machine: int
    software: str
    ranks: int
    device: Literal["cpu", "cuda"]
    bfloat16: bool


class Run(Message):
    """Start torchrun. addresses: those of all machines, in their order."""

    run: str
    addresses: list[str]


class Stop(Message):
    """End the run: that of the last `Run`."""


class Awaits(Message):
    """What somebody waits for, see `pool.hangs`; None for nothing."""

    what: Literal["start", "answer", "end of what was left behind"] | None


class Seen(Message):
    """Each second: what a machine's ranks have shown and written, as `Shown`, and whether all of them have been still
    for longer than they said. run: the one that they are of; empty where there was none yet."""

    run: str
    memory: list[tuple[int, int, int, int] | None]
    lines: list[str]
    quiet: bool


class Broke(Message):
    """A machine's part of run `run` has ended. order: how likely it is the cause, as `pool.cause` has it, the least
    most. lines: the last of its log."""

    run: str
    order: int
    text: str
    lines: list[str]


class Leave(Message):
    """This machine was told to end, and so shall all."""


class Meet(Message):
    """This connection is for a store of run `run`: what ranks and torchruns tell each other to meet. Ask follows, again
    and again."""

    run: str


class Ask(Message):
    """An operation of `torch.distributed.Store`, answered by Told.

    set: values under keys. get: waits for keys. add: a number (as text) to what is under a key. check: whether all keys
    are there. swap: the second value in place of the first. drop: a key.
    """

    what: Literal["set", "get", "add", "check", "swap", "drop"]
    keys: list[str]
    values: list[bytes] = []
    seconds: float = 0.0


class Told(Message):
    """found: whether the keys were there, in time."""

    values: list[bytes]
    found: bool = True


FromMachine = Seen | Broke | Leave
ToMachine = Welcome | Failed | Run | Stop | Awaits | Leave
ToStore = Welcome | Failed | Told
ToFirst = ToServer | Join | Meet | Ask | FromMachine
