"""Parts that follow each other, run by one native call."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.native_part import chain
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import EngineError
from tests.native_tools import ALL, kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(50)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("experts", [None, ExpertsConfig(5, 2, 40)], ids=["dense", "experts"])
def test_a_chain_is_one_part(threads: int, experts: ExpertsConfig | None) -> None:
    model = RandomModel("q4m", random_config(experts=experts, windows=(0, 0, 11)))
    whole = open_part(model, threads=threads)
    one = whole.open()
    expected = run_tokens(whole, one, TEXT, [50])
    links = [open_part(model, i, i + 1, threads=threads) for i in range(3)]
    linked = chain(links)
    assert (linked.start, linked.end) == (0, 3)
    assert linked.kv_bytes_per_token == whole.kv_bytes_per_token
    for steps in ([50], [1] * 50, [20, 1, 29]):
        sequence = linked.open()
        found = run_tokens(linked, sequence, TEXT, steps)
        assert found[0].tobytes() == expected[0].tobytes() and found[1].tobytes() == expected[1].tobytes()
        assert found[2] == expected[2]
        assert len(sequence.tables) == 3 and sequence.length == 50
        layer_first = kv_bytes(sequence)  # the chain's tables one after the other
        n = len(layer_first) // 3
        positions, size = 50, n // 50
        mine = np.frombuffer(layer_first, np.uint8).reshape(3, positions, 2, size // 2)
        theirs = np.frombuffer(kv_bytes(one), np.uint8).reshape(positions, 2, 3, size // 2)
        assert np.array_equal(mine.transpose(1, 2, 0, 3), theirs)
        sequence.close()
    assert linked.free_tokens == 1024


def test_rows_enter_and_leave_a_chain_anywhere() -> None:
    model = RandomModel("f32")
    whole, linked = open_part(model, threads=2), chain([open_part(model, 0, 1), open_part(model, 1, 3)])
    hidden = np.random.default_rng(0).standard_normal((7, model.config.d_model)).astype(np.float32)
    results = []
    for part in (whole, linked):
        a, b, c = part.open(), part.open(), part.open()
        rows = Rows().tokens(a, 0, TEXT[:9], leave=2, want=Want.HIDDEN, want_all=True)
        rows.hidden(b, 0, hidden, enter=1, want=ALL)
        rows.tokens(c, 0, TEXT[:3], leave=1, want=Want.HIDDEN)
        result = part.step(rows)
        results.append((result.hidden.tobytes(), result.logits.tobytes(), result.tokens))
    assert results[0] == results[1]


def test_links_must_follow_each_other() -> None:
    model = RandomModel("q4")
    for links in ([(0, 1), (2, 3)], [(1, 3), (0, 1)], [(0, 2), (1, 3)]):
        with pytest.raises(EngineError, match="follow"):
            chain([open_part(model, *link) for link in links])
