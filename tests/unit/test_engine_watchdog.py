"""Runs that take too long are ended, others are not, and no run has a thread of its own."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

from isthmus.engine.watchdog import Watchdog

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
