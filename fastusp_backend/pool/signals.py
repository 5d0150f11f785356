"""What a rank may have been ended by, told from the signal."""

import os

from ..config import FileState, ModelSpec


def cause_of(signal: str, model: ModelSpec | None) -> str:
    """What to say behind the name of the signal that ended a rank, which was given requests for `model`."""
    if signal == "SIGKILL":
        return " (killed by hand, or by the system when memory ran out)"
    if signal == "SIGINT":
        return " (Ctrl-C, or another process asked it to end)"
    if signal == "SIGTERM":
        return " (another process asked it to end)"
    if signal != "SIGBUS":
        return ""
    change = _change(model) if model is not None else ""
    if change:
        return f": {model.path} {change} while it was in use; get the whole file again"
    mapped = f"{model.path} or " if model is not None else ""
    return f" (a mapped file could not be read: look at the disk of {mapped}the room in /dev/shm)"


def _change(model: ModelSpec) -> str:
    try:
        return model.file.change_to(FileState.of(os.stat(model.path)))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
