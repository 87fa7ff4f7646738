"""Addresses: what is one, what only this machine reaches, and whether the host exists."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from isthmus.protocol.address import address_fault, check_address, check_host, check_listening, is_local
from isthmus.protocol.errors import LinkError, ServiceError
from isthmus.protocol.link import connect


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5757",
        "tcp://localhost:5757",
        "tcp://cloud.example:1",
        "tcp://cloud_1.example.:65535",
        "tcp://[::1]:5757",
        "tcp://[fd00::2]:5757",
        "ipc:///tmp/isthmus",
        "cloud.example:5757",
        "[::1]:5757",
    ],
)
def test_addresses_of_both_sides(address: str) -> None:
    assert address_fault(address) == address_fault(address, listening=True) == ""


@pytest.mark.parametrize("address", ["tcp://*:5757", "tcp://127.0.0.1:0"])
def test_addresses_of_the_cloud_alone(address: str) -> None:
    assert address_fault(address, listening=True) == ""
    assert address_fault(address)


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("", "has no port"),
        ("host", "has no port"),
        ("::1:5757", "is no host"),
        (":5757", "has no host"),
        ("udp://127.0.0.1:5", "does not begin with tcp://"),
        ("tcp://:5", "has no host"),
        ("tcp://host", "has no port"),
        ("tcp://host:", "has no port"),
        ("tcp://host:99999", "has no port"),
        ("tcp://host:-5", "has no port"),
        ("tcp://host:57_57", "has no port"),
        ("tcp://host:+5", "has no port"),
        ("tcp://host:٥", "has no port"),
        ("tcp://host:5757/x", "has no port"),
        ("tcp://127.0.0.1:5757 ", "space"),
        (" tcp://127.0.0.1:5757", "space"),
        ("tcp://a b:5757", "space"),
        ("tcp://host:5757\n", "space"),
        ("tcp://me@host:5757", "is no host"),
        ("tcp://::1:5757", "is no host"),
        ("tcp://[::g]:5757", "is no host"),
        ("tcp://[127.0.0.1]:5757", "is no host"),
        ("tcp://[]:5757", "is no host"),
        ("tcp://300.1.2.3:5757", "is no host"),
        ("tcp://1.2.3:5757", "is no host"),
        ("tcp://-host:5757", "is no host"),
        ("tcp://a..b:5757", "is no host"),
        ("tcp://" + "a" * 64 + ":5757", "is no host"),
        ("ipc://", "no address"),
    ],
)
def test_what_is_no_address(address: str, fault: str) -> None:
    assert fault in address_fault(address)
    assert fault in address_fault(address, listening=True)
    with pytest.raises(LinkError, match="write tcp://HOST:PORT"):
        connect(address, None, wait=False)


def test_tcp_need_not_be_written() -> None:
    assert check_address("127.0.0.1:5", encrypted=False) == "tcp://127.0.0.1:5"
    assert check_listening("*:5", encrypted=True) == "tcp://*:5"
    assert check_address("ipc:///tmp/x", encrypted=True) == "ipc:///tmp/x"
    with pytest.raises(LinkError, match="isthmus keys new"):
        check_address("192.0.2.7:5757", encrypted=False)


def test_the_clear_stays_on_this_machine() -> None:
    check_address("tcp://127.0.0.1:5", encrypted=False)
    check_listening("tcp://*:5", encrypted=True)
    with pytest.raises(LinkError, match="isthmus keys new"):
        connect("tcp://192.0.2.7:5757", None, wait=False)
    with pytest.raises(ServiceError, match="outside"):
        check_listening("tcp://*:5", encrypted=False)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:5", True),
        ("tcp://127.8.8.8:5", True),
        ("tcp://localhost:5", True),
        ("tcp://[::1]:5", True),
        ("ipc:///tmp/x", True),
        ("tcp://0.0.0.0:5", False),
        ("tcp://*:5", False),
        ("tcp://192.168.0.1:5", False),
        ("tcp://localhost.example.com:5", False),
        ("tcp://127.0.0.1.example.com:5", False),
        ("tcp://eth0:5", False),
        ("nonsense", False),
        ("tcp://[::", False),
    ],
)
def test_what_counts_as_this_machine(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("address", "says", "absent"),
    [
        ("tcp://mistyped.example:5757", socket.EAI_NONAME, True),
        ("tcp://mistyped.example:5757", socket.EAI_NODATA, True),
        ("tcp://mistyped.example:5757", socket.EAI_AGAIN, False),  # no name service, as without a network
        ("tcp://server.local:5757", socket.EAI_NONAME, False),  # its owner is away
        ("tcp://192.0.2.7:5757", socket.EAI_NONAME, False),
        ("tcp://[fd00::2]:5757", socket.EAI_NONAME, False),
        ("ipc:///tmp/isthmus", socket.EAI_NONAME, False),
    ],
)
def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, address: str, says: int, absent: bool) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise socket.gaierror(says, "the name service says so")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    if absent:
        with pytest.raises(LinkError, match=f"no host 'mistyped.example' .{address}"):
            check_host(address)
    else:
        check_host(address)


def test_a_name_service_that_does_not_answer_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    ended = Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(30))
    check_host("tcp://cloud.example:5757", wait_ms=1)
    ended.set()
