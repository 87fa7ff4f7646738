"""Numbers made small: weight formats, groups of 32, nested bit planes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "FORMATS": "packed",
    "PackedMatrix": "packed",
    "dequantize": "groups",
    "pack": "groups",
    "quantize": "groups",
    "unpack": "groups",
    "view": "nested",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
