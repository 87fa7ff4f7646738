"""Recording of routing: what a part's routers say along a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.engine.native_part import NativePart
from isthmus.engine.part import Rows, Want
from isthmus.engine.routing import Routing


def along(part: NativePart, tokens: Sequence[int]) -> Routing:
    """The routing of a new sequence's tokens.

    Args:
        part: from the first layer on, with room for them.
    """
    routing, sequence = part.record(len(tokens)), part.open()
    assert routing is not None
    try:
        part.step(Rows().tokens(sequence, 0, list(tokens), want=Want.NONE))
    finally:
        sequence.close()
        part.record(0)
    return routing


def joined(pieces: Sequence[Routing]) -> Routing:
    """One behind the other."""
    chosen, weights, foreseen = (
        np.concatenate([getattr(one, name) for one in pieces]) for name in ("chosen", "weights", "foreseen")
    )
    return Routing(chosen, weights, foreseen)
