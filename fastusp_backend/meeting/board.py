"""The store's keys and values, in the server's memory."""

import threading
import time

from ..protocol.machines import Ask, Told

MOST_BYTES = 64 << 20
"""Of all keys and values: addresses of ranks take some kilobytes."""


class Board:
    """That of one run. `close` tells those who wait that nothing comes any more."""

    def __init__(self):
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def answer(self, ask: Ask) -> Told:
        """Waits where it is asked to. Raises ValueError for what makes no sense."""
        with self._changed:
            if ask.what == "get":
                return self._get(ask.keys, ask.seconds)
            if ask.what == "check":
                return Told(values=[], found=all(key in self._values for key in ask.keys))
            if ask.what == "set":
                self._write(dict(zip(ask.keys, ask.values, strict=True)))
                return Told(values=[])
            (key,) = ask.keys
            found = self._values.get(key)
            if ask.what == "drop":
                return Told(values=[], found=self._values.pop(key, None) is not None)
            if ask.what == "add":
                (amount,) = ask.values
                self._write({key: str(int(found or b"0") + int(amount)).encode()})
            else:
                expected, desired = ask.values
                if found == expected or (found is None and not expected):
                    self._write({key: desired})
            return Told(values=[self._values.get(key, ask.values[0])])

    def _write(self, values: dict[str, bytes]) -> None:
        if sum(len(key) + len(value) for key, value in (self._values | values).items()) > MOST_BYTES:
            raise ValueError(f"a store holds no more than {MOST_BYTES} bytes")
        self._values.update(values)
        self._changed.notify_all()

    def _get(self, keys: list[str], seconds: float) -> Told:
        if not seconds >= 0:
            raise ValueError(f"{seconds} s cannot be waited")
        deadline = time.monotonic() + seconds
        while not all(key in self._values for key in keys):
            left = deadline - time.monotonic()
            if left <= 0 or self._closed:
                return Told(values=[], found=False)
            self._changed.wait(min(left, 3600.0))
        return Told(values=[self._values[key] for key in keys])
