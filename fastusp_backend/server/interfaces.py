"""The network interface that has an address, for those who want its name."""

import fcntl
import ipaddress
import socket
import struct

from ..errors import RequestError

_SIOCGIFADDR = 0x8915
_ADDRESS = slice(20, 24)
"""Of an `ifreq` with a `sockaddr_in`."""


def interface_of(address: str) -> str:
    """Raises RequestError where none of this machine's has it, or it is no address of IPv4."""
    try:
        wanted = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise RequestError(f"Give an address of IPv4, which ranks of several machines need, not {address}") from error
    if wanted.is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:
                continue  # it has none
            if answer[_ADDRESS] == wanted.packed:
                return name
    raise RequestError(f"Give an address of this machine: none of its network interfaces has {address}")
