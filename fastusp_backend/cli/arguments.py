"""Arguments that several commands take. Needs no torch, so that `doctor` starts where it is broken."""

import argparse
import re


def add_gpus(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument(
        "--gpus", default=default, help=f"as USP Loader's input: auto, all, 0,1 or cpu:N (default {default})"
    )


def add_degrees(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ulysses", type=int, default=0, help="as USP Loader's input (default 0: automatic)")
    parser.add_argument("--ring", type=int, default=0, help="likewise")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=pixels, default=(1024, 1024), help="the image in pixels: 1024 or 1280x720 (default 1024)"
    )
    parser.add_argument("--text", type=int, default=512, help="the prompt's length in tokens (default 512)")


def pixels(text: str) -> tuple[int, int]:
    """Reads (width, height) from '1024' or '1280x720'."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: expected pixels, 16 or more, as 1024 or 1280x720")
    return size
