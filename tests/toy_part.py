"""A toy part of a model: integers that depend on every earlier token at every layer."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import KV_BLOCK, Numerics, Rows, StepResult, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError, OutOfBlocks

N_LAYERS, D_MODEL, VOCAB, EOS = 6, 8, 257, 256
CONFIG = DecoderConfig(
    family="llama",
    n_layers=N_LAYERS,
    d_model=D_MODEL,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    d_ff=8,
    vocab_size=VOCAB,
    context_length=512,
    norm_eps=1e-5,
    rope_inv_freq=(1.0, 0.1),
)
MODEL_ID = "ab" * 16


class ToySequence:
    """KV as the layers' own inputs; going without a position's KV in a layer is an error."""

    def __init__(self, part: ToyPart, window: int) -> None:
        self.part, self.window, self.length = part, window, 0
        self.kv: list[dict[int, NDArray[np.float32]]] = [{} for _ in range(part.end)]

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        if 0 < self.window < self.length and length < self.length:
            raise EngineError("cannot go back")
        self.length = length
        for layer in self.kv:
            for position in [p for p in layer if p >= length]:
                del layer[position]

    def fork(self) -> ToySequence:
        raise NotImplementedError

    def lend(self, index: int) -> ToyBlock:
        first, end = index * KV_BLOCK, (index + 1) * KV_BLOCK
        assert end <= self.length
        return ToyBlock([{p: kv for p, kv in layer.items() if first <= p < end} for layer in self.kv])

    def adopt(self, blocks: Iterable[Any], enter: int) -> None:
        assert not self.length
        for block in blocks:
            self.length += KV_BLOCK
            for mine, lent in zip(self.kv[enter:], block.kv[enter:], strict=True):
                mine.update(lent)

    def close(self) -> None:
        self.kv = []


class ToyBlock:
    """A copy of what a sequence holds of 16 positions."""

    in_use = False

    def __init__(self, kv: list[dict[int, NDArray[np.float32]]]) -> None:
        self.kv = kv

    def data(self, enter: int = 0) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        self.kv = []


class ToyPart:
    """Integer arithmetic modulo 61, exact in f16, that depends on every earlier token at every layer."""

    numerics = Numerics("toy")

    def __init__(self, end: int = N_LAYERS, max_tokens: int = 100_000) -> None:
        self.config, self.start, self.end = CONFIG, 0, end
        self.max_tokens = max_tokens
        self.rows = 0

    @property
    def free_tokens(self) -> int:
        return self.max_tokens

    @property
    def kv_bytes_per_token(self) -> int:
        return 4 * self.end * self.config.d_model

    def open(self, *, window: int = 0, sinks: int | None = None) -> ToySequence:
        return ToySequence(self, window)

    def restore(self, data: bytes, enter: int = 0) -> ToyBlock:
        raise NotImplementedError

    def step(self, rows: Rows) -> StepResult:
        tokens: list[int] = []
        hidden: list[NDArray[np.float32]] = []
        for span in rows.spans:
            sequence = span.sequence
            assert isinstance(sequence, ToySequence)
            leave = self.end if span.leave is None else span.leave
            assert span.position == len(sequence.kv[span.enter]), "positions must follow each other"
            if not sequence.window and sequence.length + len(span) > self.max_tokens:
                raise OutOfBlocks("full")
            for i in range(len(span)):
                position = span.position + i
                if span.tokens is not None:
                    row = ((np.arange(D_MODEL) * 7 + span.tokens[i]) % 61).astype(np.float32)
                else:
                    assert span.hidden_in is not None
                    row = np.asarray(span.hidden_in[i])
                self.rows += 1
                for layer in range(span.enter, leave):
                    row = self._layer(sequence, layer, position, row)
                sequence.length = max(sequence.length, position + 1)
                if i == len(span) - 1 or span.want_all:
                    if span.want & Want.HIDDEN:
                        hidden.append(row)
                    if span.want & Want.SAMPLE:
                        if leave != N_LAYERS:
                            raise EngineError("no head")
                        tokens.append(self._sample(row, position, span.sampling))
        states = np.stack(hidden) if hidden else np.zeros((0, D_MODEL), np.float32)
        return StepResult(tokens, states, np.zeros((0, VOCAB), np.float32))

    def close(self) -> None:
        pass

    def _layer(self, sequence: ToySequence, layer: int, position: int, row: NDArray[np.float32]) -> NDArray[np.float32]:
        kv = sequence.kv[layer]
        kv[position] = row
        first = max(0, position + 1 - sequence.window) if sequence.window else 0
        seen = sum(kv[p] * (1 + p % 3) for p in range(first, position + 1))
        return np.asarray((3 * row[::-1] + seen + layer + position) % 61, np.float32)

    def _sample(self, row: NDArray[np.float32], position: int, sampling: Sampling) -> int:
        noise = f"{sampling.seed} {position}" if sampling.temperature else ""
        digest = blake2b(row.tobytes() + noise.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % (VOCAB if digest[0] < 4 else VOCAB - 1)
