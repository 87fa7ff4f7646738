"""Which processors the threads of a run stay on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

KEY = "session.intra_op_thread_affinities"
CAPACITY = "/sys/devices/system/cpu/cpu{}/cpu_capacity"  # of chips whose processors differ: 1024 for the fastest


def use_threads(options: Any, threads: int) -> None:
    """Gives a session so many threads of a run, each but the caller's on a processor of its own; 0 is one per core.

    A kernel may place two of them on one, where they wait for each other: then a run after a pause took 10 ms that
    takes 4 so, and 7 on one thread. Where threads are not counted the runtime does the same by itself.

    Args:
        options: onnxruntime's `SessionOptions`.
    """
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    if 1 < threads <= len(allowed):
        order = places({processor: capacity(processor) for processor in allowed}, threads, os.getpid())
        options.add_session_config_entry(KEY, ";".join(str(at + 1) for at in order[1:]))  # it counts them from 1 on


def places(capacities: dict[int, int], threads: int, process: int) -> list[int]:
    """The processors for so many threads: the fastest, and of many as fast others for another process.

    Args:
        capacities: by processor; as many as threads, or more.
        process: a number of its own.
    """
    order = sorted(capacities, key=lambda one: (-capacities[one], one))
    alike = [one for one in order if capacities[one] == capacities[order[0]]]
    if len(alike) > threads:
        turn = process * threads % len(alike)
        order = alike[turn:] + alike[:turn]
    return order[:threads]


def capacity(processor: int) -> int:
    """How fast a processor is beside the others; the same for all where nothing tells."""
    try:
        return int(Path(CAPACITY.format(processor)).read_text())
    except (OSError, ValueError):
        return 0
