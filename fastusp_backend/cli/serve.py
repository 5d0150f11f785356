"""`serve`: workers on this machine for ComfyUIs elsewhere, until SIGTERM or Ctrl-C."""

import argparse
import ipaddress
import logging
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from ..devices import local_devices
from ..errors import RequestError
from ..keyfile import Key, usual_path
from ..library import MODELS_VARIABLE
from ..server import Follower, Server
from .arguments import add_gpus

PORT = 8189
ANY = ("0.0.0.0", "::")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_gpus(parser)
    parser.add_argument(
        "--listen",
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
    several = parser.add_argument_group("several machines, as torchrun has them")
    several.add_argument("--nnodes", type=int, default=1, help="how many machines, each with as many ranks (default 1)")
    several.add_argument(
        "--node-rank", type=int, default=0, help="which of them this is; clients attach to 0 (default)"
    )
    several.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where machine 0 listens, to clients as well")
    several.add_argument(
        "--trust-network",
        action="store_true",
        help="needed beyond the loopback interface: what ranks of different machines send each other is neither "
        "encrypted nor authenticated, so nobody else may be able to reach, or read, the network between them",
    )


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    host, port = place(arguments.listen, arguments.nnodes, arguments.node_rank, arguments.rdzv_endpoint)
    if arguments.nnodes > 1 and not arguments.trust_network and not _is_loopback(host):
        raise RequestError(
            "Give --trust-network if nobody else can reach or read the network between the machines: what their ranks "
            "send each other, by gloo and NCCL, is neither encrypted nor authenticated, and its ports are open"
        )
    for folder in arguments.models:
        if not folder.is_dir():
            raise RequestError(f"Give --models folders that exist: {folder} is none")
    os.environ[MODELS_VARIABLE] = os.pathsep.join(str(folder.resolve()) for folder in arguments.models)
    devices = local_devices(arguments.gpus)
    if arguments.node_rank:
        key = Key.read(arguments.key).path.resolve()
        follower = Follower(devices, arguments.node_rank, _shown(host, port), str(key))
        _ends(follower.stop)
        print(f"FastUSP joins {_shown(host, port)} with {devices}", flush=True)
        follower.serve()
        return 0
    key = Key.read_or_make(arguments.key)
    server = Server(devices, key, host, port, arguments.nnodes)
    _ends(server.stop)
    machines = f" on each of {arguments.nnodes} machines" if arguments.nnodes > 1 else ""
    print(f"FastUSP serves {devices}{machines} at {_shown(host, server.port)}")
    print(f"The key file is {key.path.resolve()}: clients need a copy, readable by them alone", flush=True)
    server.serve()
    return 0


def place(listen: str | None, machines: int, machine: int, endpoint: str | None) -> tuple[str, int]:
    """Where the first machine listens. Raises RequestError for values that do not go together."""
    if not 0 <= machine < machines:
        raise RequestError(f"Give --node-rank from 0 to {machines - 1}, not {machine}: --nnodes is {machines}")
    if machines == 1:
        if endpoint is not None:
            raise RequestError("Give --nnodes too, or --listen in place of --rdzv-endpoint: there is one machine")
        return address(listen or f"127.0.0.1:{PORT}")
    if endpoint is None:
        raise RequestError(f"Give --rdzv-endpoint, where machine 0 listens, as 10.0.0.1:{PORT}")
    if listen not in (None, endpoint):
        raise RequestError("Leave --listen out: machine 0 listens at --rdzv-endpoint, to clients as well")
    found = address(endpoint, "--rdzv-endpoint")
    if found[0] in ANY:
        raise RequestError(
            f"Give --rdzv-endpoint the address by which the other machines reach machine 0, not {found[0]}"
        )
    return found


def _ends(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _shown(host: str, port: int) -> str:
    name = socket.gethostname() if host in ANY else host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(text: str, argument: str = "--listen") -> tuple[str, int]:
    """Reads (host, port) from 'host:port' or '[host]:port', as `argument` has it. Raises RequestError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise RequestError(f"Give {argument} an address and a port, as 10.0.0.1:{PORT}, not {text!r}")
    return match[1] or match[2], int(match[3])
