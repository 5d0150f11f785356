"""Choices between ways to the same result, measured on this machine and kept on disk, a small file each: so every later
process, and every rank, goes the same way to the same bits, and nothing is measured twice."""

import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path

log = logging.getLogger(__name__)

_made: dict[str, str] = {}
"""What this process has asked for."""


def folder() -> Path:
    """Where the choices lie: a file's name is what was asked, its text the way. To delete them has them measured
    again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fastusp" / "choices"


def kept(asked: str, among: Collection[str], measure: Callable[[], str]) -> str:
    """Returns the way that was chosen when this was first asked on this machine; measure() chooses it there.

    asked: what may differ between choices, the hardware and the libraries' versions among it. among: the ways that
    there are; a file that names another counts as none.

    Where nothing can be kept the process's own choice holds for it alone, and the log says why.
    """
    return known(asked, among) or _keep(asked, among, measure())


def known(asked: str, among: Collection[str]) -> str | None:
    """Returns the way that was chosen, None where nobody has asked."""
    if asked not in _made and (way := _read(_file(asked))) in among:
        _made[asked] = way
    return _made.get(asked)


def _file(asked: str) -> Path:
    return folder() / re.sub(r"[^\w.+]+", "-", asked)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        _not_kept(str(error))
        return None


def _keep(asked: str, among: Collection[str], way: str) -> str:
    """Returns what holds from now on: where another process was first, its way."""
    file = _file(asked)
    whole = file.with_name(f".{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(way + "\n", encoding="utf-8")
        try:
            os.link(whole, file)
        except FileExistsError:
            if (first := known(asked, among)) is not None:
                return first
            os.replace(whole, file)
        finally:
            whole.unlink(missing_ok=True)
    except OSError as error:
        _not_kept(str(error))
    _made[asked] = way
    return way


@functools.cache
def _not_kept(why: str) -> None:
    log.warning("what is measured here is measured again by the next process: %s", why)
