"""How states travel from an exit to the cloud: the smallest codec behind which the model still chooses as it did.

The engine rounds activations of its own, so that even states in f16 change some choices; a codec is judged by what it
changes beyond that. Judged are the tokens of the model's own answers: what a codec does to a whole prompt is in them.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

import numpy as np

from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import KV_BLOCK, Rows
from isthmus.protocol import tensors
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.tensors import ENTROPY_CODECS, ENTROPY_MAX_WIDTH
from isthmus.split.bundle import Bundle
from isthmus.split.exit_entry import CodecChoice
from isthmus.split.exit_states import Progress, States

EXACT = "f16"  # what the others are held against
TRIED = 100  # answers


class Tried(NamedTuple):
    """What a codec came to.

    Attributes:
        agreement: share of tokens at which the model chooses behind the codec as it did.
        row_bytes: mean of a row's.
        tokens: how many were judged.
    """

    agreement: float
    row_bytes: float
    tokens: int


class CodecTrials:
    """The layers behind an exit, given coded states of answers; a context manager.

    Args:
        layer: before which the states are.
        states: of answers; the first `TRIED` of them are used.
        stats: of the channels before the layer.
    """

    def __init__(self, bundle: Bundle, layer: int, states: States, stats: ChannelStats, threads: int = 1) -> None:
        self._layer, self._states, self._stats = layer, states, stats
        self._answers = range(min(TRIED, len(states.samples)))
        longest = max(len(states.samples[index].tokens) for index in self._answers)
        kv = KvConfig("f16", (-(-longest // KV_BLOCK) + 1) * KV_BLOCK)
        self._part = open_part(bundle, layer, bundle.config.n_layers, threads=threads, kv=kv)
        self._codecs = (*(ENTROPY_CODECS if bundle.config.d_model <= ENTROPY_MAX_WIDTH else ()), EXACT)

    def __enter__(self) -> CodecTrials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.close()

    def smallest(self, loss: float, *, exit: str, data: str, progress: Progress | None = None) -> CodecChoice:
        """The smallest codec that changes few choices, f16 where none does.

        Args:
            loss: share of the tokens that it may change beyond what f16 does.
            exit: sha256 of the exit's file, whose statistics of the channels are used.
            data: hash of the answers.
        """
        total = len(self._codecs)
        exact = self.tried(EXACT)
        for done, name in enumerate(self._codecs, 1):
            found = exact if name == EXACT else self.tried(name)
            if found.agreement >= exact.agreement - loss:
                break
            if progress:
                progress(done, total)
        if progress:
            progress(total, total)
        return CodecChoice(name, exit, data, found.tokens, loss, found.agreement, exact.agreement, found.row_bytes)

    def tried(self, codec: str) -> Tried:
        """What the model makes of the answers behind a codec."""
        agreed = judged = size = rows = 0
        for index in self._answers:
            sample = self._states.samples[index]
            hidden = np.asarray(self._states.before(self._layer, index), np.float32)
            tensor = tensors.encode(hidden, codec, plain=1, stats=self._stats)
            size, rows = size + len(tensor.data) - 2 * hidden.shape[1], rows + len(hidden) - 1
            begin = max(0, sample.answer - 1)
            given = tensors.decode(tensor, hidden.shape[1], stats=self._stats, max_rows=len(hidden))
            sequence = self._part.open()
            chosen = self._part.step(Rows().hidden(sequence, 0, given, enter=self._layer, want_all=True)).tokens
            sequence.close()
            same = np.array(chosen[begin:-1]) == self._states.choices(index)[begin:-1]
            agreed, judged = agreed + int(same.sum()), judged + len(same)
        return Tried(agreed / judged, size / rows, judged)
