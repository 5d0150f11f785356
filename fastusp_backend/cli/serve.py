"""`serve`: workers on this machine for ComfyUIs elsewhere, until SIGTERM or Ctrl-C."""

import argparse
import logging
import os
import re
import signal
import socket
from pathlib import Path

from ..devices import local_devices
from ..errors import RequestError
from ..keyfile import Key, usual_path
from ..library import MODELS_VARIABLE
from ..server import Server
from .arguments import add_gpus

PORT = 8189
ANY = ("0.0.0.0", "::")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpus(parser)
    parser.add_argument(
        "--listen",
        default=f"127.0.0.1:{PORT}",
        metavar="HOST:PORT",
        help=f"where clients reach it (default 127.0.0.1:{PORT}, which is this machine alone)",
    )
    parser.add_argument(
        "--key",
        type=Path,
        default=usual_path(),
        metavar="FILE",
        help="the key file, which is made if it is not there, and which clients need a copy of",
    )
    parser.add_argument(
        "--models",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with this machine's copies of the model files, and folders inside them",
    )


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    host, port = address(arguments.listen)
    for folder in arguments.models:
        if not folder.is_dir():
            raise RequestError(f"Give --models folders that exist: {folder} is none")
    os.environ[MODELS_VARIABLE] = os.pathsep.join(str(folder.resolve()) for folder in arguments.models)
    devices, key = local_devices(arguments.gpus), Key.read_or_make(arguments.key)
    server = Server(devices, key, host, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    shown = socket.gethostname() if host in ANY else host
    print(f"FastUSP serves {devices} at {f'[{shown}]' if ':' in shown else shown}:{server.port}")
    print(f"The key file is {key.path.resolve()}: clients need a copy, readable by them alone", flush=True)
    server.serve()
    return 0


def address(text: str) -> tuple[str, int]:
    """Reads (host, port) from 'host:port' or '[host]:port'. Raises RequestError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise RequestError(f"Give --listen an address and a port, as 10.0.0.1:{PORT}, not {text!r}")
    return match[1] or match[2], int(match[3])
