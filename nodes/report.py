"""What a pool's card copies for a bug report: versions, devices, layout, options, the last error and log lines. Of
paths it has the files' names alone, and of prompts nothing."""

import os
import platform
import re
import sys
from pathlib import Path

import torch

from ..fastusp_backend import __version__
from ..fastusp_backend.pool import Pool
from .comfyui import folder_paths, version

LOG_LINES = 60

_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")


def report(pool: Pool) -> str:
    status = pool.status()
    lines, _ = pool.log_since(0)
    python = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()} {platform.release()}"
    )
    told = [
        f"ComfyUI {version()}, FastUSP {__version__}, {python}",
        f"Pool: {status['devices']}, {status['state']}, started {status['starts']} times",
        *(f"Rank {rank}: {name}" for rank, name in enumerate(status.get("names", ()))),
    ]
    rows = {"model": "Model", "layout": "Layout", "options": "Options", "transport": "Exchanges", "weights": "Blocks"}
    told += [f"{label}: {status[name]}" for name, label in rows.items() if status.get(name)]
    for run in status["history"]:
        size = f"{run['width']} x {run['height']}, {run['images']} image(s)"
        parts = [f"Run: {run['model']}", size, f"{run['steps']} steps in {run['seconds']} s"]
        parts += [f"{run['ms_per_step']} ms each"] if run["ms_per_step"] else []
        parts += [f"{run['skipped']} of {run['evaluations']} evaluations skipped"] if run["evaluations"] else []
        told.append(", ".join([*parts, run["eight_bits"]] if run["eight_bits"] else parts))
    told += ["", "Last error:", status["error"]] if "error" in status else []
    told += ["", "Log:", *lines[-LOG_LINES:]] if lines else []
    return without_folders("\n".join(told)) + "\n"


def without_folders(text: str) -> str:
    """Leaves of each path the file's name. Folders with spaces in their names are known by where ComfyUI is and what it
    has models in."""
    known = {str(Path.home()), os.getcwd(), sys.prefix, folder_paths.base_path}
    known |= {folder for folders, _ in folder_paths.folder_names_and_paths.values() for folder in folders}
    for folder in sorted(known, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, "")
    return _FOLDERS.sub("", text)
