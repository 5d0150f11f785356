"""The `gpus` input where it may name a server: by host:port, or as fastusp.toml in ComfyUI's user folder names it."""

from pathlib import Path

from ..fastusp_backend.devices import Devices, ServerDevices, local_devices
from ..fastusp_backend.errors import DeviceError
from ..fastusp_backend.pool import ask
from ..fastusp_backend.servers import named_server
from .comfyui import folder_paths


def devices_of(gpus: str) -> Devices:
    """This machine's devices, or those of a server, which is asked. Raises DeviceError, KeyFileError, ProtocolError."""
    server = named_server(gpus, Path(folder_paths.get_user_directory()) / "fastusp.toml")
    return local_devices(gpus) if server is None else ask(server.address, str(server.key))


def own_devices(gpus: str) -> Devices:
    """As `devices_of`. Raises DeviceError for a server's, too: what is measured is measured where the devices are."""
    devices = devices_of(gpus)
    if isinstance(devices, ServerDevices):
        raise DeviceError(
            f"Run `python -m fastusp_backend bench FILE` on {devices}: only this machine is measured here"
        )
    return devices
