"""Which processors the threads of a run stay on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

KEY = "session.intra_op_thread_affinities"
CAPACITY = "/sys/devices/system/cpu/cpu{}/cpu_capacity"  # of chips whose processors differ: 1024 for the fastest
TWINS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # of one core


def use_threads(options: Any, threads: int) -> None:
    """Gives a session so many threads of a run, each but the caller's on a processor of its own; 0 is one per core.

    A kernel may place two of them on one, where they wait for each other: then a run after a pause took 10 ms that
    takes 4 so, and 7 on one thread. Where threads are not counted the runtime does the same by itself. The first of the
    processors is left to the caller, who may be on any.

    Args:
        options: onnxruntime's `SessionOptions`.
    """
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    if 1 < threads <= len(allowed):
        order = places({processor: rank(processor) for processor in allowed}, threads, os.getpid())
        options.add_session_config_entry(KEY, ";".join(str(at + 1) for at in order[1:]))  # it counts them from 1 on


def places(ranks: dict[int, tuple[int, int]], threads: int, process: int) -> list[int]:
    """The processors for so many threads: the fastest, one of a core before its twins, and of many as good ones others
    for another process.

    Args:
        ranks: by processor, as `rank` has them; as many as threads, or more.
        process: a number of its own.
    """
    order = sorted(ranks, key=lambda one: (ranks[one], one))
    alike = [one for one in order if ranks[one] == ranks[order[0]]]
    if len(alike) > threads:
        turn = process * threads % len(alike)
        order = alike[turn:] + alike[:turn]
    return order[:threads]


def rank(processor: int) -> tuple[int, int]:
    """Slowness, and how many twins of its core come before it; the smaller, the better. 0 where nothing tells."""
    return -_number(CAPACITY.format(processor)), _twins(processor).index(processor)


def _twins(processor: int) -> list[int]:
    """The processors of its core, as "0,4" or "0-1" tell them."""
    found = set[int]()
    try:
        for part in Path(TWINS.format(processor)).read_text().strip().split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        pass
    return sorted({*found, processor})


def _number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0
