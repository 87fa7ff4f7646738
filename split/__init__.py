"""Offline, on a workstation: read a model, cut it, write a bundle. Devices use only `isthmus.split.bundle`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Bundle": "bundle",
    "Checkpoint": "checkpoints",
    "Tokenizer": "tokenizer",
    "open_checkpoint": "checkpoints",
    "write_bundle": "writer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
