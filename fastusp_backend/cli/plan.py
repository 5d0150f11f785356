"""`plan`: which layout FastUSP would choose, and which are legal."""

import argparse

from ..devices import parse_devices
from ..errors import FastUSPError
from ..models.detection import detect
from ..planner import legal_layouts, plan
from ..weights.checkpoint import read_header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", default="auto", help="as USP Loader's input: auto, all, 0,1 or cpu:N (default auto)")
    parser.add_argument("--model", help="a model file, to take its head count; FLUX.1 has 24 (the default)")
    parser.add_argument("--ulysses", type=int, default=0)
    parser.add_argument("--ring", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    try:
        devices = parse_devices(arguments.gpus)
        heads = detect(read_header(arguments.model), arguments.model).heads if arguments.model else 24
        layout = plan(devices.ranks, heads, ulysses=arguments.ulysses, ring=arguments.ring)
    except FastUSPError as error:
        print(error)
        return 1
    print(f"{devices}, {heads} heads: {layout}")
    print("legal: " + ", ".join(str(x) for x in legal_layouts(devices.ranks, heads)))
    return 0
