"""Workers that clients elsewhere attach to: who may, whose turn it is, and what passes between them; on one machine or
several."""

from .follower import Follower
from .server import Server

__all__ = ["Follower", "Server"]
