"""Servers as the `gpus` input names them: host:port, or a name from fastusp.toml, so that workflows stay portable.

[servers.NAME]
address = "10.0.0.5:8189"
key = "fastusp.key"     # relative to the folder of fastusp.toml; the usual place if it is left out
"""

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .errors import DeviceError
from .keyfile import usual_path

_ADDRESS = re.compile(r"(?!(?:cpu|cuda):)(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}", re.IGNORECASE)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    address: str
    key: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    servers: dict[str, _Entry] = {}


@dataclass(frozen=True, slots=True)
class Server:
    """address: host:port. key: the path of its key file. listed: whether fastusp.toml has it."""

    address: str
    key: Path
    listed: bool = True


def named_server(text: str, file: Path) -> Server | None:
    """Which server a `gpus` value means; None where it means this machine's devices. file: fastusp.toml, which need not
    be there. Raises DeviceError where it cannot be read."""
    value = text.strip()
    entries = _read(file)
    if value in entries:
        entry = entries[value]
        if not _ADDRESS.fullmatch(entry.address):
            raise DeviceError(f'Write address = "host:port" for server {value} in {file}, not {entry.address!r}')
        return Server(entry.address, _key(entry, file))
    if address_of(value) is None:
        return None
    known = [entry for entry in entries.values() if entry.address == value]
    return Server(value, _key(known[0], file)) if known else Server(value, usual_path(), listed=False)


def known_servers(file: Path) -> str:
    """Says how `gpus` may name servers, and those that `file`, fastusp.toml, has. Raises DeviceError where it cannot be
    read."""
    names = ", ".join(map(repr, _read(file)))
    return f"a server: 'host:port', or a name from {file}, " + (f"which has {names}" if names else "which has none")


def address_of(text: str) -> str | None:
    """Returns the host:port that a `gpus` value is; None where it is none."""
    value = text.strip()
    return value if _ADDRESS.fullmatch(value) else None


def _key(entry: _Entry, file: Path) -> Path:
    return file.parent / Path(entry.key).expanduser() if entry.key else usual_path()


def _read(file: Path) -> dict[str, _Entry]:
    try:
        return msgspec.toml.decode(file.read_bytes(), type=_File).servers
    except FileNotFoundError:
        return {}
    except ImportError as error:
        raise DeviceError(f"Install tomli, which {file} needs with this Python (pip install tomli)") from error
    except (OSError, ValueError) as error:
        raise DeviceError(f"Correct {file}: {error}") from error
