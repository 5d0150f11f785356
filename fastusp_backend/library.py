"""A machine's own copy of a model file that another machine names: by its name, its size and a fast fingerprint.

A client of workers elsewhere sends no weights and no path. Each machine looks for the file in folders of its own, those
that `serve --models` was given.
"""

import functools
import hashlib
import os
import socket
from collections.abc import Iterator

from msgspec.structs import replace

from .config import FileState, ModelSpec
from .errors import CheckpointError

MODELS_VARIABLE = "FASTUSP_MODELS"
"""Holds the folders, as PATH does."""

HEAD_BYTES = 1 << 20
"""From a file's beginning: all of most headers, names and shapes of tensors."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""So many pieces, evenly spread, the last one at the end: a tenth of a second from a disk, whatever the file's size."""


@functools.lru_cache(maxsize=64)
def fingerprint(path: str, state: FileState) -> str:
    """A hash of a file's size, its beginning and samples of the rest. state: the file's, so that one that was replaced
    is read anew. Raises OSError."""
    digest = hashlib.sha256(state.size.to_bytes(8, "big"))
    with open(path, "rb") as file:
        digest.update(file.read(HEAD_BYTES))
        last = max(0, state.size - BLOCK_BYTES)
        for number in range(1, BLOCKS + 1):
            file.seek(last * number // BLOCKS)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def named(spec: ModelSpec) -> ModelSpec:
    """What is sent in place of `spec`: the file's name alone, with its size and fingerprint. Raises CheckpointError
    where the file is gone or has changed."""
    try:
        change = spec.file.change_to(FileState.of(os.stat(spec.path)))
        if change:
            raise CheckpointError(f"Queue the prompt again: {spec.path} {change} since this workflow loaded it")
        mark = fingerprint(spec.path, spec.file)
    except OSError as error:
        raise CheckpointError(f"Choose another file: {spec.path} cannot be read: {error.strerror}") from error
    size = FileState(device=0, inode=0, size=spec.file.size, mtime_ns=0)
    return replace(spec, path=os.path.basename(spec.path), file=size, fingerprint=mark)


def located(spec: ModelSpec) -> ModelSpec:
    """`spec` with the path and the state of this machine's copy, where it was named by `named`; else as it is.

    Raises CheckpointError where this machine has none, or another file of that name: it names the machine and the paths
    it looked at.
    """
    if not spec.fingerprint:
        return spec
    folders = [folder for folder in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if folder]
    name, others = os.path.basename(spec.path), []
    for path in _files(folders, name):
        try:
            state = FileState.of(os.stat(path))
            if state.size == spec.file.size and fingerprint(path, state) == spec.fingerprint:
                return replace(spec, path=path, file=state, fingerprint="")
        except OSError as error:
            others.append(f"{path} cannot be read ({error.strerror})")
        else:
            differs = f"{state.size} bytes" if state.size != spec.file.size else "other contents"
            others.append(f"{path} is another file ({differs})")
    machine = socket.gethostname()
    if others:
        raise CheckpointError(
            f"Copy {name} ({spec.file.size} bytes) from ComfyUI's machine to {machine}: there, {'; '.join(others)}"
        )
    looked = f"looked in {', '.join(folders)}" if folders else "it was given no folder"
    raise CheckpointError(
        f"Copy {name} ({spec.file.size} bytes) to {machine}, or give `serve` there the folder that has it (--models): "
        f"{looked}"
    )


def _files(folders: list[str], name: str) -> Iterator[str]:
    """The files of that name in the folders, and in those inside them, of which links may make rings."""
    seen: set[tuple[int, int]] = set()
    for folder in folders:
        for parent, inside, files in os.walk(os.path.abspath(folder), followlinks=True):
            state = os.stat(parent)
            if (state.st_dev, state.st_ino) in seen:
                inside.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            inside[:] = sorted(x for x in inside if not x.startswith("."))
            if name in files:
                yield os.path.join(parent, name)
