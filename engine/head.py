"""Output heads that know some of the vocabulary only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import EngineError


def head_tokens(source: WeightSource) -> NDArray[np.int32] | None:
    """The tokens that a source's output head has rows for, [rows] int32 ascending; None for the whole vocabulary.

    Raises:
        EngineError: ids that do not ascend, are none of the vocabulary, or are none at all.
    """
    method = getattr(source, "head_tokens", None)
    tokens = method() if method else None
    if tokens is None:
        return None
    vocab = source.config.vocab_size
    ids = np.array(tokens)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or (np.diff(ids.astype(np.int64)) < 1).any():
        raise EngineError(f"the output head's tokens are {ids.dtype}{list(ids.shape)}", "list ascending token ids")
    if ids[0] < 0 or ids[-1] >= vocab:
        raise EngineError(
            f"the output head's tokens are {ids[0]}..{ids[-1]}", f"the vocabulary has {vocab}: split the model again"
        )
    return ids.astype(np.int32)


def check_head(rows: int, cols: int, tokens: NDArray[np.int32] | None, vocab_size: int, d_model: int) -> None:
    """Refuses a head [rows, cols] of another shape than its tokens and the model have.

    Raises:
        EngineError: it has.
    """
    expected = vocab_size if tokens is None else len(tokens)
    if (rows, cols) != (expected, d_model):
        raise EngineError(f"the output head is {rows} x {cols}, not {expected} x {d_model}")
