"""The kinds of faults."""

from .base import Fault
from .clients import Cancel, HostDeath, Interrupt
from .files import Files, Mapped
from .limits import Descriptors, FileSize, FullDisk, Memory
from .processes import Blind, Close, Kill, KillTorchrun, Leave, Loop, Pause, Stop, StopThenCancel
from .wire import Frames, HalfFrame, Ports, Strangers

KINDS: dict[str, type[Fault]] = {
    "cancel": Cancel,
    "interrupt": Interrupt,
    "kill": Kill,
    "torchrun": KillTorchrun,
    "blind": Blind,
    "exit": Leave,
    "stop": Stop,
    "stop-cancel": StopThenCancel,
    "pause": Pause,
    "loop": Loop,
    "close": Close,
    "host": HostDeath,
    "files": Files,
    "mapped": Mapped,
    "memory": Memory,
    "descriptors": Descriptors,
    "filesize": FileSize,
    "disk": FullDisk,
    "frames": Frames,
    "half": HalfFrame,
    "strangers": Strangers,
    "ports": Ports,
}

__all__ = ["KINDS", "Fault"]
