"""Choices between ways to the same result, measured on this machine and kept on disk, a small file each: so the ranks
of a machine and all later processes go the same way, to the same bits, and do not measure again."""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from .user_folders import user_folder

log = logging.getLogger(__name__)

_chosen: dict[str, str] = {}
"""Ways by question, as far as this process has asked."""


def folder() -> Path:
    """Where the choices lie: a file's name is the question, its text the way. To delete them has them measured again by
    processes that start then."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "choices"


def choose(question: str, ways: Collection[str], measure: Callable[[], str]) -> str:
    """Returns the way that was chosen when the question was first asked on this machine; measure() chooses it there.

    question: all that choices may depend on, the hardware and the libraries' versions among it. ways: a file that names
    none of them does not count.

    Where nothing can be kept the process's own choice holds for it alone, and the log says why.
    """
    return known(question, ways) or _keep(question, ways, measure())


def known(question: str, ways: Collection[str]) -> str | None:
    """Returns the way that was chosen, None where nobody has asked or it is none of the ways."""
    if question not in _chosen and (way := _read(question)) in ways:
        _chosen[question] = way
    return _chosen.get(question)


def _file(question: str) -> Path:
    if not folder().is_absolute():
        raise OSError("neither HOME nor XDG_CACHE_HOME says where")
    return folder() / re.sub(r"[^\w.+]+", "-", question)


def _read(question: str) -> str | None:
    try:
        return _file(question).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        _not_kept(error)
        return None


def _keep(question: str, ways: Collection[str], way: str) -> str:
    """Returns what holds from now on: where another process was first, its way."""
    try:
        file = _file(question)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as beside:
            whole = Path(beside) / "way"
            whole.write_text(way + "\n", encoding="utf-8")
            try:
                os.link(whole, file)  # fails where another process was first
            except FileExistsError:
                if (first := known(question, ways)) is not None:
                    return first
                os.replace(whole, file)
    except OSError as error:
        _not_kept(error)
    _chosen[question] = way
    return way


def _not_kept(error: OSError) -> None:
    _warn(f"What is measured here cannot be kept in {folder()}, and each process measures again: {error}")


@functools.cache
def _warn(text: str) -> None:
    log.warning(text)
