"""Attends to devices while the engine computes: a long step must not look like a dead link."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Lock, Thread

_log = logging.getLogger("isthmus.cloud")
_SHORT_S = 0.004  # a step that ends sooner is left alone
_REST_S = 0.008  # after which it is looked again, whatever the connections say
_ASLEEP_S = 0.02  # without a step, until the second thread sleeps


class Attendant:
    """A second thread that has the connections for as long as the first one is inside the engine, and never else.

    Whoever computes lends them with `with attendant:`. That costs a microsecond or two: the second thread is not woken
    for a step, it looks a while after its begin whether it is still under way, and sleeps while there is nothing to
    compute. Until it is started, and after it is closed, nothing is lent.

    Args:
        attend: reads and answers a bounded part of what is there, without waiting; whether there may be more.
        stirs: waits so many seconds at most until there may be something; needs no connection.
        short_s: that a step takes before it is attended to.
    """

    def __init__(self, attend: Callable[[], bool], stirs: Callable[[float], object], short_s: float = _SHORT_S) -> None:
        self._attend, self._stirs, self._short_s = attend, stirs, short_s
        self._hand = Lock()  # held by the thread that may use the connections
        self._wanted = Event()
        self._step, self._began, self._computing = 0, 0.0, False
        self._thread: Thread | None = None
        self._closed = False

    def start(self) -> None:
        """From here on the calling thread has the connections, but for the steps that it makes."""
        thread = Thread(target=self._run, name="isthmus-attendant", daemon=True)
        self._hand.acquire()
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Ends the second thread; may be called twice, and by the first one only."""
        self._closed, self._computing = True, False
        self._wanted.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def __enter__(self) -> None:
        if self._thread is not None:
            self._step += 1
            self._began, self._computing = time.monotonic(), True
            self._hand.release()
            if not self._wanted.is_set():
                self._wanted.set()

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._computing = False
            self._hand.acquire()

    def _run(self) -> None:
        while not self._closed:
            self._wanted.wait()
            step, passed_s = self._step, time.monotonic() - self._began
            if passed_s < self._short_s:
                time.sleep(self._short_s - passed_s)
            elif self._computing:
                self._during(step)
            elif passed_s < _ASLEEP_S:
                time.sleep(self._short_s)
            else:
                self._wanted.clear()
                if self._stirred():  # since it was looked
                    self._wanted.set()

    def _stirred(self) -> bool:
        return self._computing or self._closed

    def _during(self, step: int) -> None:
        wait: Callable[[float], object] | None = None
        while self._computing and self._step == step and self._hand.acquire(blocking=False):
            try:
                wait = None if self._attend() else self._stirs
            except Exception:  # it is tried again soon, and the step goes on
                _log.exception("looking after devices during a step failed")
                wait = time.sleep
            finally:
                self._hand.release()
            if wait is not None:
                wait(_REST_S)
