"""Functions that a child process must survive: they take too much, or break it."""

from __future__ import annotations

import ctypes


def spin() -> None:
    """Takes all the time there is."""
    while True:
        pass


def hoard() -> int:
    """Takes all the memory there is."""
    return len([bytes(1 << 28) for _ in range(1 << 10)])


def crash() -> None:
    """Reads where nothing is."""
    ctypes.string_at(0)
