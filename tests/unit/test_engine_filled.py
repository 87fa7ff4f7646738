"""Each layer of a sequence knows which positions it holds: rows never read KV that was not written for their past."""

from __future__ import annotations

import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import EngineError
from tests.native_tools import open_part, some_tokens
from tests.random_model import RandomModel

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(20)


def test_layers_that_rows_left_out_are_refused_until_they_are_filled() -> None:
    model = RandomModel("f32")
    part = open_part(model)
    sequence, whole = part.open(), part.open()
    truth = part.step(Rows().tokens(whole, 0, TEXT, want=Want.LOGITS)).logits
    hidden = part.step(Rows().tokens(sequence, 0, TEXT[:19], leave=1, want=Want.HIDDEN, want_all=True)).hidden
    with pytest.raises(EngineError, match=r"layers \[0, 3\) of the sequence hold 0"):
        part.step(Rows().tokens(sequence, 19, TEXT[19:]))
    rows = Rows().hidden(sequence, 0, hidden, enter=1, want=Want.NONE).tokens(sequence, 19, TEXT[19:], want=Want.LOGITS)
    assert part.step(rows).logits.tobytes() == truth.tobytes()


def test_rewriting_the_past_forgets_what_followed_it() -> None:
    part = open_part(RandomModel("f32"))
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, TEXT))
    part.step(Rows().tokens(sequence, 10, [TEXT[0]]))
    assert sequence.length == 11
    with pytest.raises(EngineError, match="hold 11"):
        part.step(Rows().tokens(sequence, 12, TEXT[12:13]))
    part.step(Rows().tokens(sequence, 5, TEXT[:2], leave=1, want=Want.NONE))  # deeper layers keep positions 0..4
    assert sequence.length == 7
    with pytest.raises(EngineError, match="hold 5"):
        part.step(Rows().tokens(sequence, 7, TEXT[7:8]))
