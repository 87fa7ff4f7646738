"""The KV of one sequence as float32 buffers that onnxruntime extends in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.part import KV_BLOCK, KvBlock
from isthmus.protocol.errors import EngineError

if TYPE_CHECKING:
    from isthmus.engine.onnx_part import OnnxPart

SLACK = 64  # positions that a windowed sequence keeps beyond its window, so that it can be rolled back


class OnnxSequence:
    """A sequence of an `OnnxPart`. Every layer counts its own positions, because rows enter and leave anywhere."""

    def __init__(self, part: OnnxPart, n_layers: int, window: int) -> None:
        self.part: OnnxPart | None = part
        self.window = window
        self.held = [0] * n_layers  # positions of each layer, dropped ones included
        self.base = [0] * n_layers  # first position that a layer still holds
        self.buffers: list[tuple[NDArray[np.float32], NDArray[np.float32]] | None] = [None] * n_layers
        self.bindings: dict[tuple[int, int], tuple[Any, Any]] = {}  # session and binding

    @property
    def length(self) -> int:
        """Positions held by the layer that holds the most."""
        return max(self.held, default=0)

    @property
    def n_blocks(self) -> int:
        """Blocks of 16 positions that count against the part's KV."""
        return blocks(max((h - b for h, b in zip(self.held, self.base, strict=True)), default=0))

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on.

        Raises:
            EngineError: a negative length, or one that the window has already left behind.
        """
        if length == 0:
            self.base = [0] * len(self.base)
        first = self.first(0, len(self.base))
        if length < first:
            raise EngineError(f"a sequence cannot be cut back to {length} positions", f"its window reaches {first}")
        self.held = [min(h, length) for h in self.held]

    def first(self, low: int, high: int) -> int:
        """The earliest position at which layers [low, high) can still be computed."""
        return max((b + self.window - 1 for b in self.base[low:high] if b), default=0)

    def fork(self) -> OnnxSequence:
        """A copy that goes its own way.

        Raises:
            OutOfBlocks: the part has no room for the copy.
            EngineError: the sequence is closed.
        """
        if self.part is None:
            raise EngineError("a closed sequence cannot be forked", "open a new one")
        other = self.part.open(window=self.window)
        try:
            self.part.reserve(self.n_blocks)
        except EngineError:
            other.close()
            raise
        other.held, other.base = list(self.held), list(self.base)
        other.buffers = [None if pair is None else (pair[0].copy(), pair[1].copy()) for pair in self.buffers]
        return other

    def lend(self, index: int) -> KvBlock:
        """See `engine.part.Sequence.lend`; there are no blocks here."""
        raise no_blocks()

    def adopt(self, blocks: Iterable[KvBlock], enter: int) -> None:
        """See `engine.part.Sequence.adopt`; there are no blocks here."""
        raise no_blocks()

    def close(self) -> None:
        """Gives the buffers back."""
        if self.part is not None:
            self.part.forget(self)
        self.part = None
        self.buffers, self.bindings = [], {}

    def make_room(self, low: int, high: int, position: int, n_new: int, shape: tuple[int, int]) -> None:
        """Lets the buffers [1, n_kv_heads, capacity, head_dim] of layers [low, high) take positions [position, +n_new).

        With a window, positions that it has left behind are dropped, whole blocks at a time, the same ones in all
        these layers.
        """
        base = max(self.base[low:high])
        if self.window and position - base > self.window + SLACK + 4 * KV_BLOCK:
            base += (position - base - self.window - SLACK) // KV_BLOCK * KV_BLOCK
        for layer in range(low, high):
            drop, pair = base - self.base[layer], self.buffers[layer]
            kept = self.held[layer] - base
            need = max(kept, position + n_new - base)
            if pair is not None and not drop and need <= pair[0].shape[2]:
                continue
            growth = min(2 * kept, self.window + SLACK + 5 * KV_BLOCK) if self.window else 2 * kept
            capacity = blocks(max(need, growth, 64)) * KV_BLOCK
            fresh = tuple(np.zeros((1, shape[0], capacity, shape[1]), np.float32) for _ in range(2))
            for new, old in zip(fresh, pair or (), strict=False):
                new[:, :, :kept] = old[:, :, drop : drop + kept]
            self.buffers[layer] = (fresh[0], fresh[1])
            self.base[layer] = base
            self.bindings = {}


def no_blocks() -> EngineError:
    """The error of what needs KV in blocks."""
    return EngineError("ONNX Runtime keeps no KV in blocks", "use the native engine")


def blocks(positions: int) -> int:
    """Blocks of 16 that positions fill."""
    return -(-positions // KV_BLOCK)
