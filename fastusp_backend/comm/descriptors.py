"""File descriptors from rank to rank of a host, by SCM_RIGHTS (unix(7)): memory that has no name is shared by them.

Not through another process's /proc, as files are: what a GPU's memory has for a descriptor cannot be opened there.
"""

import array
import contextlib
import errno
import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from .groups import GROUP_TIMEOUT, all_gather_single

_PATH_BYTES = 108
"""The most that a socket's address takes."""
_MOST = 200
"""Descriptors in one message; Linux takes 253."""
_HEAD = struct.Struct("II")
"""Of a message: the sender's position, and how many descriptors it sent."""


class Mailbox:
    """A socket in a folder that this user alone can enter. Raises OSError."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        if len(os.fsencode(self._folder.name)) + len("/s") >= _PATH_BYTES:
            self._folder = tempfile.TemporaryDirectory(dir="/tmp")
        self.path = str(Path(self._folder.name, "s"))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(GROUP_TIMEOUT.total_seconds())
        self.socket.bind(self.path)

    def close(self) -> None:
        self.socket.close()
        self._folder.cleanup()


def exchange_descriptors(
    mailbox: Mailbox, own: Sequence[int], group: dist.ProcessGroup, held: contextlib.ExitStack
) -> list[list[int]]:
    """Gives every rank's descriptors to all ranks of a group; this one's own list is empty. `held` closes those that
    came. Collective.

    Raises MemoryError, behind all that is exchanged, where this process, or all of this user's, may open no more files.
    """
    position, size = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.zeros(_PATH_BYTES + 1, dtype=torch.int64)
    path = os.fsencode(mailbox.path)
    mine[0], mine[1 : 1 + len(path)] = len(own), torch.tensor(list(path))
    members = mine.new_empty(size, len(mine))
    all_gather_single(members.view(-1), mine, group=group)
    found: list[list[int]] = [[] for _ in range(size)]
    came = [0] * size  # as many as were sent: fewer may arrive
    for hop in range(1, size):
        to, source = (position + hop) % size, (position - hop) % size
        address = bytes(members[to, 1:].tolist()).rstrip(b"\0")
        for first in range(0, len(own), _MOST):
            _send(mailbox.socket, address, position, own[first : first + _MOST])
        while came[source] < members[source, 0]:
            said, arrived, _, _ = socket.recv_fds(mailbox.socket, _HEAD.size, _MOST)
            for descriptor in arrived:
                held.callback(os.close, descriptor)
            sender, count = _HEAD.unpack(said)
            came[sender] += count
            found[sender] += arrived
    if sum(map(len, found)) < sum(came):
        raise MemoryError("too many open files: raise the limit (ulimit -n)")
    return found


def _send(sender: socket.socket, address: bytes, position: int, descriptors: Sequence[int]) -> None:
    said = [_HEAD.pack(position, len(descriptors))]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    try:
        sender.sendmsg(said, rights, 0, address)
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        sender.sendmsg(said, [], 0, address)  # whoever gets it misses them, and all refuse together
