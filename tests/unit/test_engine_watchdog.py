"""Runs that take too long are ended, others are not, and no run has a thread of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

from isthmus.engine.watchdog import WATCHDOG, Watchdog

FOREVER_S = 600.0


def ended(run: SimpleNamespace) -> bool:
    """Whether it is, within a time that only a watchdog that sleeps on does not keep."""
    until = time.monotonic() + 30.0
    while not run.terminate and time.monotonic() < until:
        time.sleep(0.005)
    return bool(run.terminate)


def test_a_run_is_ended_when_its_time_is_up() -> None:
    watchdog, long, short, over = Watchdog(), *(SimpleNamespace(terminate=False) for _ in range(3))
    watchdog.begin(long, FOREVER_S)
    number = watchdog.begin(over, 0.05)
    watchdog.end(number)
    watchdog.begin(short, 0.1)  # sooner than the one that it sleeps for
    assert ended(short) and not long.terminate and not over.terminate
    again = SimpleNamespace(terminate=False)
    watchdog.begin(again, 0.01)
    assert ended(again) and not long.terminate


def test_runs_share_a_thread() -> None:
    watchdog = Watchdog()
    before = threading.active_count()
    for _ in range(50):
        watchdog.end(watchdog.begin(SimpleNamespace(terminate=False), FOREVER_S))
    assert threading.active_count() <= before + 1


def test_threads_may_begin_and_end_at_once() -> None:
    watchdog, runs = Watchdog(), [SimpleNamespace(terminate=False) for _ in range(8)]

    def work(run: SimpleNamespace) -> None:
        for _ in range(200):
            watchdog.end(watchdog.begin(run, FOREVER_S))
        watchdog.begin(run, 0.01)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert all(ended(run) for run in runs)


def test_a_process_that_was_forked_has_a_watchdog_of_its_own() -> None:
    stop, busy = threading.Event(), SimpleNamespace(terminate=False)

    def work() -> None:
        while not stop.is_set():
            WATCHDOG.end(WATCHDOG.begin(busy, FOREVER_S))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            if not (child := os.fork()):
                run = SimpleNamespace(terminate=False)
                WATCHDOG.begin(run, 0.01)
                os._exit(0 if ended(run) else 1)
            until, status = time.monotonic() + 30.0, (0, 0)
            while not status[0] and time.monotonic() < until:
                status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.005)
            if not status[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert status == (child, 0)
    finally:
        stop.set()
        thread.join()


def test_a_limit_may_be_longer_than_anything_waits() -> None:
    watchdog, run, short = Watchdog(), SimpleNamespace(terminate=False), SimpleNamespace(terminate=False)
    watchdog.begin(run, 1e12)
    time.sleep(0.02)
    watchdog.begin(short, 0.01)
    assert ended(short) and not run.terminate
