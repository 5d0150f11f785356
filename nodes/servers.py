"""The `gpus` input where it may name a server: by host:port, or as fastusp.toml in ComfyUI's user folder names it."""

from pathlib import Path

from ..fastusp_backend.devices import Devices, ServerDevices, local_devices
from ..fastusp_backend.errors import DeviceError
from ..fastusp_backend.pool import ask
from ..fastusp_backend.servers import Server, known_servers, named_server
from .comfyui import folder_paths


def devices_of(gpus: str) -> Devices:
    """This machine's devices, or those of a server, which is asked. Raises DeviceError, KeyFileError, ProtocolError."""
    return served(gpus) or local_devices(gpus, known_servers(_file()))


def served(gpus: str | None) -> ServerDevices | None:
    """Those of a server, which is asked; None where it means none. Raises as `devices_of`."""
    if gpus is None:
        return None
    server = server_of(gpus)
    return ask(server.address, str(server.key)) if server is not None else None


def server_of(gpus: str) -> Server | None:
    """Which server is meant, which is not asked; None where it means none. Raises DeviceError as `named_server`."""
    return named_server(gpus, _file())


def _file() -> Path:
    return Path(folder_paths.get_user_directory()) / "fastusp.toml"


def own_devices(gpus: str) -> Devices:
    """This machine's devices. Raises DeviceError for a server's, too: what is measured is measured where they are."""
    server = server_of(gpus)
    if server is not None:
        raise DeviceError(
            f"Run `python -m fastusp_backend bench FILE --gpus {server.address} --key {server.key}`: only this machine "
            f"is measured here"
        )
    return local_devices(gpus)
