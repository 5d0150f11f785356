"""A model file that is open. What is read of it (header, scales, weights, and weights anew) is read through this one
descriptor: it comes from one file, whatever is put at its path meanwhile."""

import os
import stat
import weakref

from ..config import FileState
from ..errors import CheckpointError


def changed(path: str, change: str, when: str) -> CheckpointError:
    """change: as `FileState.change_to` says it."""
    return CheckpointError(f"Wait until nothing writes to {path}, then queue the prompt again: it {change} {when}")


class Source:
    """An open file, closed with the last reference to this, or by `close`. state: its state when it was opened.

    Raises CheckpointError where there is no such file, or it cannot be opened.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"Rename the model file {ascii(path)}: its name is not UTF-8") from error
        try:
            # A pipe of that name would have this wait for whoever writes to it.
            file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        except FileNotFoundError as error:
            raise CheckpointError(f"Give the path of a file that exists: there is no model file {path}") from error
        except OSError as error:
            raise self._unreadable(error) from error
        self.close = weakref.finalize(self, file.close)
        self.descriptor = file.fileno()
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise CheckpointError(f"Use another file: {path} is not a regular file")
        self.state = FileState.of(os.fstat(self.descriptor))

    def read(self, start: int, count: int) -> bytes:
        """Reads `count` bytes. Raises CheckpointError where the file ends before, or cannot be read."""
        pieces, done = [], 0
        try:
            while done < count and (piece := os.pread(self.descriptor, count - done, start + done)):
                pieces.append(piece)
                done += len(piece)
        except OSError as error:
            raise self._unreadable(error) from error
        if done < count:
            self.check("while it was being read")
            raise CheckpointError(f"Download {self.path} again. It is truncated: it ends at byte {start + done}")
        return b"".join(pieces)

    def check(self, when: str) -> None:
        """Raises CheckpointError, which says `when`, where the file is not as it was opened. A file that was removed,
        or whose path leads to another one now, is."""
        try:
            change = self.state.change_to(FileState.of(os.fstat(self.descriptor)))
        except OSError as error:  # of a network mount whose server has the file no more
            raise self._unreadable(error) from error
        if change:
            raise changed(self.path, change, when)

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot read the model file {self.path}: {error.strerror or error}")
