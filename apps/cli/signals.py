"""What a command that writes files does when it is told to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, frame: FrameType | None) -> None:
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)  # what is cleaned up now is not to be interrupted
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Lets SIGINT, SIGTERM and SIGHUP end what is inside as exceptions do, so that it can take away what it began.

    A signal that is ignored or has a handler of its own keeps it.

    Raises:
        SystemExit: a signal came; the exit code is 128 and its number, as shells have it.
        KeyboardInterrupt: it was SIGINT.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _ENDING}
        before = {n: h for n, h in found.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
        for number in before:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
