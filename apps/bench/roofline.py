"""The speed that memory allows: every decoded token reads all weights once (Williams et al., Roofline, 2009)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.split.manifest import EMBEDDING, HEAD, Manifest, expert_file

BUFFER_BYTES = 128 << 20  # far beyond a core's own caches, small enough for a small device
REPEATS = 5


def read_bandwidth(threads: int, *, buffer_bytes: int = BUFFER_BYTES, repeats: int = REPEATS) -> float:
    """Bytes a second that `threads` threads read together from a buffer they pass over again and again.

    The best of a few runs; each thread reduces its own slice, and numpy releases the interpreter meanwhile. Give
    the bytes of a token's weights as `buffer_bytes` and the caches help as much as they help decoding.
    """
    data = np.ones(max(threads, buffer_bytes // 8), dtype=np.uint64)
    slices = np.array_split(data, threads)

    def consume(part: NDArray[np.uint64]) -> Any:
        return np.maximum.reduce(part)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first one starts the threads and wakes the processor
            begin = time.perf_counter()
            list(pool.map(consume, slices))
            best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def token_bytes(manifest: Manifest) -> int:
    """Bytes of weights that one decoded token reads: everything but an embedding that is not the head as well, and of
    experts those that a token takes."""
    experts, unread = manifest.config.experts, EMBEDDING if HEAD in manifest.files else None
    routed = {expert_file(layer) for layer in range(manifest.config.n_layers) if manifest.config.experts_of(layer)}
    sizes = {name: one.bytes for name, one in manifest.files.items() if name.startswith("weights/") and name != unread}
    taken = sum(size for name, size in sizes.items() if name in routed)
    return sum(sizes.values()) - (taken - taken * experts.top_k // experts.n_experts if experts else 0)


def steal_ticks(root: Path = Path("/")) -> tuple[int, int]:
    """Clock ticks that the host took away and ticks in all since the start, (0, 0) where the kernel does not say."""
    try:
        ticks = [int(value) for value in (root / "proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return 0, 0
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else (0, 0)
