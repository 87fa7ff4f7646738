"""What an exit says, as the engine runs it with the weights that the bundle has."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from isthmus.engine import KvConfig, open_part
from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import KV_BLOCK, Rows, Want
from isthmus.quant.packed import PackedMatrix
from isthmus.split.certificate import Said
from isthmus.split.exit_states import Progress, States
from isthmus.split.exits import ExitSource
from isthmus.split.roles import Weights

_AT_ONCE = 128  # rows whose logits are held


class ExitScores:
    """An exit along samples whose states are known; a context manager.

    Args:
        states: of which the longest sample must fit.
    """

    def __init__(self, exit: ExitSource, layer: int, states: States, threads: int = 1) -> None:
        self._states, self._layer, self._tokens = states, layer, exit.head_tokens()
        longest = max((len(sample.tokens) for sample in states.samples), default=0)
        kv = KvConfig("f16", -(-longest // KV_BLOCK) * KV_BLOCK + KV_BLOCK)
        self._part = open_part(_Reduced(exit), layer, layer + 1, threads=threads, kv=kv)

    def __enter__(self) -> ExitScores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.close()

    def along(self, index: int) -> Said:
        """Along a sample: of documents each next token, of answers each of the answer's tokens.

        The confidence is the softmax probability of the most likely token among those that the exit's head can name.
        """
        sample, states = self._states.samples[index], self._states.before(self._layer, index)
        start, end = (max(0, sample.answer - 1), len(sample.tokens) - 1) if sample.answer else (0, len(sample.tokens))
        choices = self._states.choices(index)[start:end]
        confidence = np.empty(end - start, np.float32)
        right = np.empty(end - start, np.bool_)
        sequence = self._part.open()
        if start:
            self._part.step(Rows().hidden(sequence, 0, _f32(states[:start]), enter=self._layer, want=Want.NONE))
        for at in range(start, end, _AT_ONCE):
            rows = slice(at, min(at + _AT_ONCE, end))
            asked = Rows().hidden(sequence, at, _f32(states[rows]), enter=self._layer, want=Want.LOGITS, want_all=True)
            logits = self._part.step(asked).logits
            here = slice(rows.start - start, rows.stop - start)
            likely = logits.argmax(axis=1)
            top = logits[np.arange(len(logits)), likely]
            confidence[here] = 1 / np.exp(logits - top[:, None]).sum(axis=1)
            right[here] = (likely if self._tokens is None else self._tokens[likely]) == choices[here]
        sequence.close()
        return Said(confidence, right)

    def all(self, indices: range, progress: Progress | None = None) -> list[Said]:
        """Along several samples."""
        found = []
        for done, index in enumerate(indices, 1):
            found.append(self.along(index))
            if progress:
                progress(done, len(indices))
        return found


class _Reduced:
    """An exit whose vocabulary is what its head can name, so that every back end runs it."""

    def __init__(self, exit: ExitSource) -> None:
        self._exit, self._head = exit, exit.head()

    @property
    def config(self) -> DecoderConfig:
        return replace(self._exit.config, vocab_size=self._head.rows)

    def embedding(self) -> PackedMatrix:
        return self._exit.embedding()

    def layer(self, index: int) -> Weights:
        return self._exit.layer(index)

    def final_norm(self) -> NDArray[np.float32]:
        return self._exit.final_norm()

    def head(self) -> PackedMatrix:
        return self._head


def _f32(states: NDArray[np.float16]) -> NDArray[np.float32]:
    return np.asarray(states, np.float32)


def agreement(said: list[Said]) -> float:
    """The share of tokens at which an exit named the model's choice."""
    return float(np.concatenate([one.right for one in said]).mean())


def would_emit(said: list[Said], disagreement: float) -> float:
    """The largest share of tokens above a threshold of which at most `disagreement` of all are wrong, no promise."""
    confidence, right = (np.concatenate([one[i] for one in said]) for i in range(2))
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(~right[order]) / len(right)
    return float((wrong <= disagreement).mean())
