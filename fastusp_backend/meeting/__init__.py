"""Where the ranks of several machines, and their torchruns, find each other: a store at the server, behind its key.

torch's own store for several machines listens on all interfaces and asks for no key, and the rendezvous that torchrun
builds on it unpickles what it finds there.
"""

from .board import Board
from .store import MeetingStore

__all__ = ["Board", "MeetingStore"]
