"""What travels between a device and a cloud. Knows nobody."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AllowList": "keys",
    "DeviceKeys": "keys",
    "KeyPair": "keys",
    "Link": "link",
    "LinkLimits": "limits",
    "connect": "link",
    "IsthmusError": "errors",
    "LinkError": "errors",
    "ProtocolError": "errors",
    "Refused": "transport",
}

__all__ = [
    "AllowList",
    "DeviceKeys",
    "IsthmusError",
    "KeyPair",
    "Link",
    "LinkError",
    "LinkLimits",
    "ProtocolError",
    "Refused",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"isthmus.protocol.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
