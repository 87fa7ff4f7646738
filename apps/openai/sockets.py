"""Where OpenAI's API is answered."""

from __future__ import annotations

import socket

from isthmus.cloud.http import host_port
from isthmus.protocol.errors import ServiceError

OPTION = "--openai"


def bound(address: str) -> socket.socket:
    """A socket bound to HOST:PORT, which does not listen yet.

    Raises:
        ServiceError: the address is none, or taken.
    """
    host, port = host_port(address, OPTION)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        why = error.strerror or str(error)
        raise ServiceError(f"cannot listen on {address}: {why}", f"choose another {OPTION} port") from error
    return found
