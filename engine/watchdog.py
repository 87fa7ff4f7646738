"""Ends runs that take too long: one thread for all, as a thread for each run would cost small networks a third."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any, Protocol


class Endable(Protocol):
    """A run's options; onnxruntime's `RunOptions` are some."""

    terminate: bool


class Watchdog:
    """See the module; may be used by any thread."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """As it is in a process of its own, where no thread watches."""
        self._changed = threading.Condition()
        self._due = dict[int, tuple[float, Any]]()  # by a number of its own: when a run is ended, and the run
        self._count = 0
        self._wakes_s = math.inf
        self._thread: threading.Thread | None = None

    def begin(self, run: Endable, limit_s: float) -> int:
        """Watches a run that begins; gives the number by which it ends."""
        due_s = time.monotonic() + limit_s
        with self._changed:
            self._count += 1
            self._due[self._count] = due_s, run
            if self._thread is None or not self._thread.is_alive():  # not yet, or not in this process
                self._thread = threading.Thread(target=self._watch, name="isthmus-watchdog", daemon=True)
                self._thread.start()
            elif due_s < self._wakes_s:
                self._changed.notify()
            return self._count

    def end(self, number: int) -> None:
        """It is over."""
        with self._changed:
            self._due.pop(number, None)

    def _watch(self) -> None:
        with self._changed:
            while True:
                now_s = time.monotonic()
                for number, (due_s, run) in list(self._due.items()):
                    if due_s <= now_s:
                        run.terminate = True
                        del self._due[number]
                self._wakes_s = min((due_s for due_s, _ in self._due.values()), default=math.inf)
                self._changed.wait(min(self._wakes_s - now_s, threading.TIMEOUT_MAX))


WATCHDOG = Watchdog()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WATCHDOG._forget)
