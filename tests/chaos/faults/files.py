"""Model files that change."""

import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

from ..requests import Caller, Request
from .base import Fault


class _OfAFile(Fault):
    """victim: a copy of the request's model, which the request is for. other: the model that may take its place."""

    allowed = frozenset({"refused"})
    changes: tuple[str, ...] = ()

    def draw(self) -> None:
        self.victim = self.world.folder / f"victim-{self.rng.randrange(1 << 30)}.safetensors"
        self.other = next(m for m in ("b", "a") if m != self.request.model and m in self.world.models)
        self.change = self.rng.choice(self.changes)
        self.names = re.escape(str(self.victim))

    def use(self) -> None:
        """Has the victim loaded."""
        Request("short", self.request.model).run(self.world, Caller())

    def prepare(self) -> None:
        shutil.copy(self.world.files[self.request.model], self.victim)
        self.world.give(self.request.model, self.victim)

    def strike(self) -> None:
        change_file(self.change, self.victim, self.world.files[self.other], self.rng)

    def lift(self) -> None:
        self.world.give(self.request.model, None)
        self.victim.unlink(missing_ok=True)

    def is_right(self, latents) -> str:
        """One model's or the other's."""
        first = self.world.compare(self.request, latents)
        if first != "wrong" or self.change not in ("swapped", "overwritten"):
            return first
        return self.world.compare(replace(self.request, model=self.other), latents)


class Files(_OfAFile):
    """A model file is damaged, swapped, overwritten or deleted between prompts."""

    moments = ("idle",)
    changes = ("cut", "flipped", "empty", "garbage", "deleted", "swapped", "overwritten")
    keeps = True

    def draw(self) -> None:
        super().draw()
        self.resident = self.rng.random() < 0.5
        # Who asks for the old one while it is mapped: see Mapped.
        atomic = self.change in ("deleted", "swapped")
        self.old = self.rng.random() < 0.5 and (atomic or not self.resident)
        self.detail = (
            f"{'resident' if self.resident else 'file'} {self.change}, the {'old' if self.old else 'new'} asked for"
        )

    def prepare(self) -> None:
        super().prepare()
        if self.resident:
            self.use()
        elif self.world.ranks():
            self.world.release()
        if self.old:
            self.world.give(self.request.model, self.world.spec_of(self.victim))

    def is_right(self, latents) -> str:
        if self.change in ("swapped", "overwritten") and not self.old:
            return self.world.compare(replace(self.request, model=self.other), latents)
        return super().is_right(latents)


class Mapped(_OfAFile):
    """A model file is cut short, overwritten, swapped or deleted while it is loaded or in use."""

    moments = ("idle", "load", "delay", "step")
    changes = ("cut", "cut", "swapped", "overwritten", "deleted")
    allowed = frozenset({"refused", "died"})

    def prepare(self) -> None:
        super().prepare()
        self.world.give(self.request.model, self.world.spec_of(self.victim))
        if self.moment.kind != "load":
            self.use()
        self.detail = f"file {self.change}"


def change_file(how: str, path: Path, other: Path, rng: random.Random) -> None:
    """In place, but for `swapped` and `deleted`."""
    size, stat = path.stat().st_size, path.stat()
    header = 8 + int.from_bytes(_read(path, 0, 8), "little")
    if how == "cut":
        os.truncate(path, rng.choice((rng.randrange(8), rng.randrange(header), rng.randrange(header, size), size - 1)))
    elif how == "flipped":
        place = rng.choice((rng.randrange(8), rng.randrange(8, header)))
        _write(path, place, bytes([_read(path, place, 1)[0] ^ 1 << rng.randrange(8)]))
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "garbage":
        _write(path, 0, rng.randbytes(rng.choice((8, 1000, header))))
    elif how == "deleted":
        path.unlink()
    elif how == "swapped":
        shutil.copy(other, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    else:
        with open(path, "r+b") as file:
            file.write(other.read_bytes())
            file.truncate()
    if path.exists() and how != "swapped":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the system's clock may stand for milliseconds


def _read(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _write(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)
