"""Where a cloud listens, and where a device finds it: the form of an address, and whether its host exists."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from urllib.parse import urlsplit

from isthmus.protocol.errors import LinkError, ServiceError

REMEDY = "write tcp://HOST:PORT"
RESOLVE_MS = 5000
_TCP = "tcp://"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_PORT = re.compile(r"[0-9]{1,5}")
_ABSENT = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


def full_address(address: str) -> str:
    """HOST:PORT as tcp://HOST:PORT; everything else as it is."""
    return f"{_TCP}{address}" if ":" in address and "://" not in address else address


def address_fault(address: str, *, listening: bool = False) -> str:
    """What is wrong with the form of an address, empty if nothing: ZeroMQ would take part of a bad port for a port.

    Who listens may also name port 0 for any free one, the host `*` for all, or a network interface.
    """
    if address.startswith(("ipc://", "inproc://")):
        return "" if address.partition("://")[2] else f"{address!r} is no address"
    if not address.isprintable() or " " in address:
        return f"{address!r} has a space in it"
    full = full_address(address)
    if not full.startswith(_TCP):
        return f"{address!r} {'does not begin with ' + _TCP if '://' in address else 'has no port'}"
    host, colon, port = full.removeprefix(_TCP).rpartition(":")
    if not colon or not _PORT.fullmatch(port) or not int(not listening) <= int(port) < 2**16:
        return f"{address!r} has no port in {int(not listening)}..65535"
    if not _is_host(host) and not (listening and host == "*"):
        return f"{address!r} has no host" if not host else f"{host!r} in {address!r} is no host"
    return ""


def check_address(address: str, *, encrypted: bool) -> str:
    """Makes sure that a device may connect there, and gives the full address.

    Raises:
        LinkError: it is no address, or in the clear and not on this machine.
    """
    if fault := address_fault(address):
        raise LinkError(fault, REMEDY)
    if not encrypted and not is_local(address):
        raise LinkError(f"{address} is not on this machine and there are no keys", "run: isthmus keys new")
    return full_address(address)


def check_listening(address: str, *, encrypted: bool) -> str:
    """Makes sure that a cloud may listen there, and gives the full address.

    Raises:
        ServiceError: it is no address, or would be open to everybody.
    """
    if fault := address_fault(address, listening=True):
        raise ServiceError(fault, "listen on tcp://HOST:PORT")
    if not encrypted and not is_local(address):
        raise ServiceError(
            f"{address} can be reached from outside and there are no keys",
            "run `isthmus keys new` first, or listen on 127.0.0.1",
        )
    return full_address(address)


def is_local(address: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if address.startswith(("ipc://", "inproc://")):
        return True
    try:
        host = urlsplit(full_address(address)).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(address: str, wait_ms: int = RESOLVE_MS) -> None:
    """Makes sure that the host of a TCP address is not one that the name service says does not exist.

    A name service that does not answer within `wait_ms`, or cannot be asked, is no fault: a device without a network
    has none. Neither is a name in `.local`, which only its owner answers for (RFC 6762).

    Raises:
        LinkError: there is no such host.
    """
    address = full_address(address)
    host = urlsplit(address).hostname or ""
    if not address.startswith(_TCP) or host.removesuffix(".").endswith(".local") or _is_ip(host):
        return
    absent: list[bool] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            absent.append(error.errno in _ABSENT)
        except (OSError, UnicodeError):
            pass

    asking = threading.Thread(target=resolve, name="resolve", daemon=True)
    asking.start()
    asking.join(wait_ms * 1e-3)
    if any(absent):
        raise LinkError(f"there is no host {host!r} ({address})", "check the spelling of the cloud's address")


def _is_host(host: str) -> bool:
    """Whether it is an IPv4 address, an IPv6 address in brackets, or could be a name."""
    if host.startswith("[") and host.endswith("]"):
        return _is_ip(host[1:-1]) and ":" in host
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdigit():  # no name ends so (RFC 1123)
        return _is_ip(host)
    return len(host) < 254 and all(map(_LABEL.fullmatch, labels))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
