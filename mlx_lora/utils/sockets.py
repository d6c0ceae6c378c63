"""Open the socket that a server listens on, and tell addresses of this machine from others."""

from __future__ import annotations

import ipaddress
import socket

from mlx_lora.utils.errors import InputError


def is_local(host: str) -> bool:
    """Tell whether a host name or address can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return an open listening socket and its URL; it is opened before the server says that it is ready, so a port in use is found.

    Args:
        host: name or address of this machine.
        port: 0 for any free port.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot listen on this address ({error.strerror or error}); choose another"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    return opened, f"http://{shown}:{opened.getsockname()[1]}"
