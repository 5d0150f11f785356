"""What client and workers say to each other, and how it is framed. Both sides import this room; nothing here runs a
model."""

from .channel import Channel, Frame
from .messages import (
    VERSION,
    Cancel,
    Done,
    Evaluate,
    Failed,
    Held,
    Hello,
    Message,
    Park,
    Patch,
    Phase,
    Ready,
    Release,
    Sample,
    Shutdown,
    Step,
    Unmap,
)
from .shared import ADVICE, Places, SharedMemory, SharedTensors, inline_tensors

__all__ = [
    "ADVICE",
    "VERSION",
    "Cancel",
    "Channel",
    "Done",
    "Evaluate",
    "Failed",
    "Frame",
    "Held",
    "Hello",
    "Message",
    "Park",
    "Patch",
    "Phase",
    "Places",
    "Ready",
    "Release",
    "Sample",
    "SharedMemory",
    "SharedTensors",
    "Shutdown",
    "Step",
    "Unmap",
    "inline_tensors",
]
