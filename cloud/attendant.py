"""Attends to devices while the engine computes: a long step must not look like a dead link."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Lock, Thread

_log = logging.getLogger("isthmus.cloud")
_SHORT_S = 0.008  # nobody misses a cloud for that long: a step that ends sooner is left alone
_REST_S = 0.05  # and after that much more it is looked again, whatever the connections say


class Attendant:
    """A second thread that has the connections for as long as the first one is inside the engine, and never else.

    Whoever computes lends them with `with attendant:`. That costs a microsecond or two: the second thread is not woken
    for a step, it looks from time to time whether a long one is under way, and sleeps while there is nothing to
    compute. Until it is started, and after it is closed, nothing is lent.

    Args:
        attend: reads and answers what is there, without waiting.
        stirs: waits so many seconds at most until there may be something; needs no connection.
    """

    def __init__(self, attend: Callable[[], None], stirs: Callable[[float], object], short_s: float = _SHORT_S) -> None:
        self._attend, self._stirs, self._short_s = attend, stirs, short_s
        self._hand = Lock()  # held by the thread that may use the connections
        self._wanted = Event()
        self._steps = 0
        self._thread: Thread | None = None
        self._closed = False

    def start(self) -> None:
        """From here on the calling thread has the connections, but for the steps that it makes."""
        self._hand.acquire()
        self._thread = Thread(target=self._run, name="isthmus-attendant", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the second thread; may be called twice, and by the first one only."""
        if self._thread is not None:
            self._closed = True
            self._wanted.set()
            self._thread.join()
            self._thread = None
            self._hand.release()

    def __enter__(self) -> None:
        if self._thread is not None:
            self._steps += 1
            if not self._wanted.is_set():
                self._wanted.set()
            self._hand.release()

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._hand.acquire()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            step = self._steps
            time.sleep(self._short_s)
            if self._closed:
                return
            if self._steps != step:
                continue
            if not self._hand.acquire(blocking=False):  # none is under way
                self._wanted.clear()
                if self._steps != step:  # one was begun between the two
                    self._wanted.set()
                continue
            self._hand.release()
            self._during(step)

    def _during(self, step: int) -> None:
        while self._steps == step and self._hand.acquire(blocking=False):
            try:
                self._attend()
            except Exception:  # devices may take the cloud for gone during this step; it goes on nevertheless
                _log.exception("looking after devices during a step failed")
                return
            finally:
                self._hand.release()
            self._stirs(_REST_S)
