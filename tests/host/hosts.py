"""The ComfyUIs that are there to be tested."""

import os
import re
from pathlib import Path


def host_paths() -> list[Path]:
    value = os.environ.get("COMFYUI_PATHS") or "~/ComfyUI"
    paths = [Path(text).expanduser() for text in value.split(os.pathsep) if text]
    return [path for path in paths if (path / "main.py").is_file()]


def version(path: Path) -> str:
    return re.search(r'__version__ = "(.+)"', (path / "comfyui_version.py").read_text())[1]


def knows_small_flux(path: Path) -> bool:
    return tuple(map(int, version(path).split(".")[:2])) >= (0, 4)
