"""Command line: `python -m fastusp_backend bench | demo | doctor | plan | serve | verify`."""

import argparse
import importlib
import sys

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastusp_backend", description="FastUSP without ComfyUI.")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:  # it alone is imported: `doctor` runs where the others' imports fail
            with importing():
                module = importlib.import_module(f".cli.{name}", __package__)
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


if __name__ == "__main__":
    leave(main())
