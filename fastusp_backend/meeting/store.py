"""The ranks' end of the store: torch asks it as any of its own."""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store

from ..door import enter
from ..errors import DeviceError
from ..protocol import Channel
from ..protocol.machines import Ask, Meet, Told, ToStore

ENTER_SECONDS = 30.0
"""Many ranks come at the same time, and the server hears few at a time."""


class MeetingStore(Store):
    """The store of `run` at the server at `address`. Whoever makes it keeps it: torch alone does not. Any thread may
    ask while others wait for a key."""

    def __init__(self, address: str, key: str, run: str):
        """Raises DeviceError where the server does not answer, KeyFileError or ProtocolError."""
        super().__init__()
        self._address, self._key, self._run = address, key, run
        self._idle: list[Channel] = []
        self._lock = threading.Lock()
        self._idle.append(self._entered())

    def _entered(self) -> Channel:
        deadline = time.monotonic() + ENTER_SECONDS
        while True:
            try:
                channel, _, _ = enter(self._address, self._key, ToStore)
                break
            except DeviceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        channel.send(Meet(run=self._run))
        return channel

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", [key], [_bytes(value)])

    def get(self, key: str) -> bytes:
        return self._wait_for([key], None)[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait_for(keys, None)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._ask("set", list(keys), [_bytes(value) for value in values])

    def has_extended_api(self) -> bool:
        return False

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", [key], [str(amount).encode()]).values[0])

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask("check", list(keys)).found

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait_for(keys, timeout)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._ask("swap", [key], [_bytes(expected), _bytes(desired)]).values[0]

    def delete_key(self, key: str) -> bool:
        return self._ask("drop", [key]).found

    def _wait_for(self, keys: Sequence[str], timeout: timedelta | None) -> list[bytes]:
        limit = timeout or self.timeout
        told = self._ask("get", list(keys), seconds=limit.total_seconds())
        if not told.found:
            raise RuntimeError(f"timed out: another rank did not come within {limit}: no {', '.join(keys)}")
        return told.values

    def _ask(self, what: str, keys: list[str], values: Sequence[bytes] = (), seconds: float = 0.0) -> Told:
        with self._lock:
            channel = self._idle.pop() if self._idle else None
        try:
            channel = channel or self._entered()  # a thread waits for a key on each of the others
            channel.send(Ask(what=what, keys=keys, values=list(values), seconds=seconds))
            reply, _ = channel.receive()
        except BaseException as error:
            if channel is not None:
                channel.close()
            if isinstance(error, EOFError | OSError | DeviceError):
                raise RuntimeError("Connection closed by peer: the server's store is gone") from error
            raise
        with self._lock:
            self._idle.append(channel)
        if not isinstance(reply, Told):
            raise RuntimeError(f"the server's store refused {what} of {keys}: {reply}")
        return reply


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
