"""A server as its administrator starts it, and the pools that attach to it."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fastusp_backend.pool import Pool, ask
from fastusp_backend.worker.process import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60


class Serving:
    """`serve` in a process of its own. key: its key file. said: the lines that it has written so far. prefix: what its
    command begins with."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        listen: str | None = "127.0.0.1:0",
        prefix: tuple[str, ...] = (),
    ):
        self.key, self.said = folder / "key", []
        command = [*prefix, sys.executable, "-m", "fastusp_backend", "serve", "--key", str(self.key)]
        command += ["--listen", listen] if listen else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # a run of tests may be killed
        )
        self._pools: list[Pool] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append(line)

    def says(self, pattern: str, seconds: float = START_SECONDS) -> re.Match:
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, "".join(self.said))) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.said}"
            time.sleep(0.02)
        return found

    @property
    def address(self) -> str:
        return self.says(r"at (\S+:\d+)\n")[1]

    def attach(self) -> Pool:
        """A pool of its workers."""
        self._pools.append(Pool(ask(self.address, str(self.key))))
        return self._pools[-1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.end()
        self.process.stdout.close()


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **how) -> Iterator[Serving]:
    server = Serving(folder, *arguments, **how)
    try:
        yield server
    finally:
        server.close()


def run_dirs_of(process: int, base: Path) -> set[Path]:
    """The run directories in `base` that this process holds."""
    held = set()
    for fd in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(Path(os.readlink(fd)))
    return {path for path in base.iterdir() if path in held}
