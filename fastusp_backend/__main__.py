"""Command line: `python -m fastusp_backend bench | demo | doctor | plan | serve | verify`."""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from .errors import FastUSPError
from .worker.process import importing, leave

COMMANDS = {
    "bench": "how fast your own file is on 1, 2, ... all GPUs, and which settings are best",
    "demo": "the main job on what every machine has: a picture by the shipped model on CPU ranks, checked by one",
    "doctor": "what is wrong with this machine, and what to do about it",
    "plan": "which layouts are legal, the memory that a file's weights take, and what a step takes on 1 to 8 GPUs",
    "serve": "workers on this machine, for ComfyUIs that attach to them from elsewhere",
    "verify": "what each lossy option costs in exactness, alone and together, on your own file, and what to take",
}

PACKAGES = ("PIL", "msgspec", "numpy", "safetensors", "tqdm")
"""Of requirements.txt, by the names under which they are imported; nvml.py tells of its own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastusp_backend", description="FastUSP without ComfyUI.")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:  # it alone is imported: `doctor` runs where the others' imports fail
            try:
                with importing():
                    module = importlib.import_module(f".cli.{name}", __package__)
            except ModuleNotFoundError as error:
                remedy = _remedy((error.name or "").partition(".")[0])
                if remedy is None:
                    raise
                print(f"{remedy}: {error}", file=sys.stderr)
                return 2
            module.add_arguments(command)
    arguments = parser.parse_args()
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return module.run(arguments)
    except FastUSPError as error:
        print(error, file=sys.stderr)
        return 2


def _remedy(package: str) -> str | None:
    """What brings a package that commands import; None for one that FastUSP does not ask for."""
    if package == "torch":
        return "Install torch as pytorch.org says, or use the Python that runs ComfyUI"
    if package not in PACKAGES:
        return None
    requirements = Path(__file__).resolve().parents[1] / "requirements.txt"
    return shlex.join((sys.executable, "-m", "pip", "install", "-r", str(requirements)))


if __name__ == "__main__":
    leave(main())
