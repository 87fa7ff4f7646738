"""Looking into native parts: what a sequence's KV holds, and running tokens in steps of chosen sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.native_part import NativePart, open_native
from isthmus.engine.native_sequence import NativeSequence
from isthmus.engine.part import KV_BLOCK, KvConfig, Rows, Want, WeightSource
from isthmus.engine.sampling import GREEDY, Sampling

ALL = Want.HIDDEN | Want.LOGITS | Want.SAMPLE


def open_part(model: WeightSource, start: int = 0, end: int | None = None, **settings: Any) -> NativePart:
    """Layers [start, end) on one thread with room for 1,024 positions, unless `settings` say otherwise."""
    kv = KvConfig(settings.pop("format", "f16"), settings.pop("max_tokens", 1024))
    end = model.config.n_layers if end is None else end
    return open_native(model, start, end, threads=settings.pop("threads", 1), kv=kv, **settings)


def kv_bytes(sequence: NativeSequence) -> bytes:
    """K and V of every layer, head and held position; those that a window let go are left out."""
    assert sequence.part is not None
    config, out = sequence.part.config, []
    width = -(-config.head_dim // 16) * 16
    for table in sequence.tables:
        memory = table.pool.memory
        element = np.uint32 if sequence.part._layers[0].c_part.kv_f32 else np.uint16
        for position in range(table.dropped * KV_BLOCK, sequence.length):
            block = memory[table.blocks[position // KV_BLOCK]].view(element).reshape(-1, 2, KV_BLOCK * width)
            at = position % KV_BLOCK
            out.append(block[:, 0].reshape(-1, width, KV_BLOCK)[:, : config.head_dim, at].tobytes())
            out.append(block[:, 1].reshape(-1, KV_BLOCK, width)[:, at, : config.head_dim].tobytes())
    return b"".join(out)


def run_tokens(
    part: NativePart,
    sequence: NativeSequence,
    tokens: list[int],
    steps: Iterable[int],
    *,
    sampling: Sampling = GREEDY,
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
    """Appends tokens in steps of the given sizes; logits and hidden states [n, .] and samples of all of them."""
    logits, hidden, samples, at = [], [], [], 0
    for n in steps:
        rows = Rows().tokens(sequence, sequence.length, tokens[at : at + n], want=ALL, want_all=True, sampling=sampling)
        result = part.step(rows)
        logits.append(result.logits)
        hidden.append(result.hidden)
        samples += result.tokens
        at += n
    assert at == len(tokens)
    return np.concatenate(logits), np.concatenate(hidden), samples


def some_tokens(n: int, seed: int = 0, vocab: int = 101) -> list[int]:
    """n token ids."""
    found: list[int] = np.random.default_rng(seed).integers(0, vocab, n).tolist()
    return found
