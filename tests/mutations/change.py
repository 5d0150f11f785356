"""A small wrong change to the code."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Change:
    """One text of one file, replaced by another.

    file: within the repository.
    what: the change in words.
    old, new: the text that it replaces, which the file has once, and what takes its place.
    tests: what should notice, as pytest takes it.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    def applied(self, text: str) -> str:
        """Returns the file's text with the change. Raises ValueError where `old` is not in it exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has this {text.count(self.old)} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)

    def make(self, tree: Path) -> None:
        """Makes the change in a copy of the repository. Raises as `applied`."""
        path = tree / self.file
        path.write_text(self.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
