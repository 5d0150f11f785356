"""Command line: `python -m fastusp_backend demo | plan | verify`."""

import argparse
import sys

from .cli import demo, plan, verify

COMMANDS = {"demo": demo, "plan": plan, "verify": verify}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastusp_backend", description="FastUSP without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__.split(": ", 1)[1]))
    arguments = parser.parse_args()
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
