"""Workers that clients elsewhere attach to: who may, whose turn it is, and what passes between them."""

from .server import Server

__all__ = ["Server"]
