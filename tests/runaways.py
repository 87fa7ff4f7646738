"""Functions that a child process must survive: they take too much, or break it."""

from __future__ import annotations

import ctypes
import os
import signal


def spin() -> None:
    """Takes all the time there is."""
    while True:
        pass


def hoard() -> int:
    """Takes all the memory there is."""
    return len([bytes(1 << 28) for _ in range(1 << 10)])


def killed() -> None:
    """Is ended from outside, as when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    """Reads where nothing is."""
    ctypes.string_at(0)
