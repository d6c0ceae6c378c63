"""What all our servers share without a web framework: the socket, errors in OpenAI's format, and reading JSON bodies."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Collection
from typing import Any

from mlx_lora.utils.errors import InputError


class ApiError(Exception):
    """An error answer in OpenAI's format."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def read_json(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: it is not a JSON object, or has text that is not valid Unicode.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # refuses half a surrogate pair, which escapes can write
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8 ({error}); send a JSON object", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; send an object", "invalid_json")
    return body


def read_fields(raw: bytes, known: Collection[str]) -> dict[str, Any]:
    """Return a body's JSON object, which has no other fields than these.

    Raises:
        ApiError: it has, or is no JSON object.
    """
    body = read_json(raw)
    if strange := body.keys() - known:
        raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
    return body


def is_number(value: Any, low: float, high: float, whole: bool = False) -> bool:
    """Tell whether a value of a body is a number, no truth value, in a range."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def read_number(
    body: dict[str, Any], name: str, low: float, high: float, default: Any = None, whole: bool = True
) -> Any:
    """Return a number of a body, the default if it is not given.

    Raises:
        ApiError: 400, it is none, or out of range.
    """
    value = body.get(name)
    if value is not None and not is_number(value, low, high, whole):
        raise bad_value(name, value, f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}")
    return default if value is None else value


def read_typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a value of a body that has a kind, the default if it is not given.

    Raises:
        ApiError: 400, it is of another kind.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        words = {bool: "true or false", str: "a string", dict: "an object", list: "a list"}
        raise bad_value(name, value, words[kind])
    return default if value is None else value


def bad_value(name: str, value: Any, wanted: str) -> ApiError:
    """Return the error of a field that has another value than it must have."""
    return ApiError(400, f"{name} {shown_value(value)}: must be {wanted}", "invalid_value", name)


def shown_value(value: Any) -> str:
    """Return a value of a body for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# The address


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
