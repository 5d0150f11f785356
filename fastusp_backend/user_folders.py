"""Where what a user keeps lies: in the folder that a variable names, else below the home folder (XDG Base Directory
Specification, by which a variable that names no absolute folder does not count)."""

import os
from pathlib import Path


def user_folder(variable: str, usual: str) -> Path:
    """variable: XDG_CACHE_HOME, say. usual: the folder below home, .cache then. Where there is no home the path is not
    absolute."""
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else Path(os.path.expanduser("~")) / usual) / "fastusp"
