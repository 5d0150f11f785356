"""What the machines of one server must have alike, since ranks send each other what only the same code expects."""

import hashlib
import importlib.metadata
from pathlib import Path

from ..errors import PoolError

PACKAGE = Path(__file__).parents[1]


class Software:
    """FastUSP's code and torch's release on this machine, as they were when `serve` started; as text for other machines
    and people. torch's builds for several CUDA versions count as one: NCCL compares itself."""

    def __init__(self, package: Path = PACKAGE):
        self._package = package
        self._found = self._look()

    def __str__(self) -> str:
        return self._found

    def check(self) -> None:
        """Raises PoolError where they have changed, since a run's processes would take what is there now."""
        if (now := self._look()) != self._found:
            raise PoolError(f"Restart `serve`: it started with {self}, and there is {now} now")

    def _look(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self._package.rglob("*.py")):
            digest.update(f"{path.relative_to(self._package)}\0".encode() + path.read_bytes() + b"\0")
        torch = importlib.metadata.version("torch").partition("+")[0]
        return f"FastUSP {digest.hexdigest()[:8]} (of its code) and torch {torch}"
