"""The step that decoding is made of: one row that goes on where the one before it ended, and the same way."""

from __future__ import annotations

import struct
import sys
from sys import getrefcount
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.part import NO_CONFIDENCE, Span, StepResult, Want

ROW = struct.Struct("8i")  # an `im_row`
NOTHING: NDArray[np.float32] = np.zeros((0, 0), np.float32)
_F32 = np.dtype(np.float32)
_HIDDEN, _SAMPLE, _CONFIDENCE = int(Want.HIDDEN), int(Want.SAMPLE), int(Want.CONFIDENCE)
# Whether a count of references tells that nobody else holds an array: CPython's does, under its global lock. Without
# the lock counts change while they are read, and other interpreters have none: there each state gets its own array.
COUNTED = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class DecodeRow:
    """A native call of one row, prepared once. A part run layer by layer from Python makes thousands of such calls a
    second, each with cold caches behind a layer's weights: what counts is how little memory a call touches.

    Args:
        common: an `im_step_call` whose parts, samplings and tokens it shares.
        vocab_size, d_model, end: of the part.

    Attributes:
        call: the `im_step_call *`.
    """

    __slots__ = (
        "_alive",
        "_confidence",
        "_end",
        "_ffi",
        "_hidden_in",
        "_hidden_out",
        "_row",
        "_shape",
        "_tokens",
        "_vocab",
        "call",
    )

    def __init__(self, ffi: Any, common: Any, vocab_size: int, d_model: int, end: int) -> None:
        self._ffi, self._vocab, self._shape, self._end = ffi, vocab_size, (1, d_model), end
        self._hidden_in = np.zeros(self._shape, np.float32)
        row, hidden = ffi.new("im_row *"), ffi.from_buffer("float[]", self._hidden_in)
        self._row, self._tokens = ffi.buffer(row), common.tokens_out
        self.call = ffi.new("im_step_call *", common[0])
        self.call.rows, self.call.n_rows, self.call.hidden_in, self.call.n_hidden = row, 1, hidden, 1
        self._confidence = self.call.confidence_out = ffi.new("float *")
        self._alive = row, hidden
        self._renew()

    def _renew(self) -> None:
        self._hidden_out = np.empty(self._shape, np.float32)
        self.call.hidden_out = self._ffi.from_buffer("float[]", self._hidden_out)

    def put(self, span: Span, slot: int, sampling: int) -> bool:
        """Writes the row down; False when its token or hidden state is none of this model."""
        # Where somebody holds the state before this one, it stays as it is.
        if not COUNTED or getrefcount(self._hidden_out) > 2:
            self._renew()
        tokens, leave = span.tokens, span.leave
        if tokens is not None:
            token = tokens[0]
            if not 0 <= token < self._vocab:
                return False
        else:
            token, hidden = -1, cast("NDArray[np.float32]", span.hidden_in)
            if hidden.dtype is not _F32 or hidden.shape != self._shape:
                return False
            self._hidden_in[:] = hidden
        if leave is None:
            leave = self._end
        ROW.pack_into(self._row, 0, slot, span.position, token, 0, span.enter, leave, span.want, sampling)
        return True

    def result(self, want: int) -> StepResult:
        """What the row gave; the hidden state is the caller's."""
        hidden = self._hidden_out if want & _HIDDEN else NOTHING
        confidence = np.array([self._confidence[0]], _F32) if want & _CONFIDENCE else NO_CONFIDENCE
        return StepResult([self._tokens[0]] if want & _SAMPLE else [], hidden, NOTHING, confidence)
