"""One row after the other, which the native back end runs by a prepared call: same bits, same refusals."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from isthmus.engine import native_decode
from isthmus.engine.binding import cpu_names
from isthmus.engine.part import Rows, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(80)
DRAWN = Sampling(temperature=0.8, top_k=20, seed=5)


@pytest.mark.parametrize("threads", [1, 2])
def test_row_by_row_gives_the_bits_of_one_step(threads: int) -> None:
    model = RandomModel("q4")
    part = open_part(model, threads=threads)
    _, hidden, greedy = run_tokens(part, part.open(), TEXT, [80])
    _, _, drawn = run_tokens(part, part.open(), TEXT, [80], sampling=DRAWN)
    one, two = part.open(), part.open(window=1000)
    for at, token in enumerate(TEXT):
        got = part.step(Rows().tokens(one, at, [token], want=Want.HIDDEN | Want.SAMPLE))
        assert got.hidden.tobytes() == hidden[at].tobytes() and got.tokens == [greedy[at]]
        sampling = DRAWN if at % 3 else Sampling()
        got = part.step(Rows().tokens(two, at, [token], sampling=sampling))
        assert got.tokens == [(drawn if at % 3 else greedy)[at]] and not got.hidden.size
        assert one.length == two.length == at + 1


def test_states_are_copies_and_may_be_strided() -> None:
    model = RandomModel("q4")
    part = open_part(model, 1, 2)
    states = np.random.default_rng(0).standard_normal((20, model.config.d_model)).astype(np.float32)
    rows = Rows().hidden(part.open(), 0, states, enter=1, want=Want.HIDDEN, want_all=True)
    expected = part.step(rows).hidden
    wide = np.repeat(states, 2, axis=1)
    for source in (states, wide[:, ::2], np.asfortranarray(states)):
        sequence = part.open()
        got = [
            part.step(Rows().hidden(sequence, at, source[at : at + 1], enter=1, want=Want.HIDDEN)).hidden
            for at in range(20)
        ]
        assert np.concatenate(got).tobytes() == expected.tobytes()


@pytest.mark.parametrize("counted", [True, False])
def test_a_state_that_is_held_is_never_written_again(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if counted:
        assert getattr(sys, "_is_gil_enabled", lambda: True)() == native_decode.COUNTED
    else:  # as without the interpreter's global lock: any count would do
        monkeypatch.setattr(native_decode, "COUNTED", False)
        monkeypatch.setattr(native_decode, "getrefcount", lambda _: 0)
    model = RandomModel("q4")
    part = open_part(model, 1, 2)
    states = np.random.default_rng(0).standard_normal((30, model.config.d_model)).astype(np.float32)
    sequence, copies = part.open(), list[bytes]()
    held: list[Any] = []
    for at in range(30):
        got = part.step(Rows().hidden(sequence, at, states[at : at + 1], enter=1, want=Want.HIDDEN)).hidden
        copies.append(got.tobytes())
        views: list[Any] = [got, got[:, 3:], got.ravel(), memoryview(got)]  # type: ignore[arg-type]
        held.append(views[at % 4])  # views keep it alive too
        del got, views
    for at, (kept, copy) in enumerate(zip(held, copies, strict=True)):
        assert bytes(kept) == (copy[12:] if at % 4 == 1 else copy)


def test_what_does_not_fit_is_refused_in_the_middle() -> None:
    model = RandomModel("q4")
    part, tail = open_part(model), open_part(model, 1)
    state = np.ones((1, model.config.d_model), np.float32)
    sequence, other = part.open(), tail.open()
    for at in range(5):
        part.step(Rows().tokens(sequence, at, [1]))
        tail.step(Rows().hidden(other, at, state, enter=1))
    for token in (-1, 101):
        with pytest.raises(EngineError, match="vocabulary"):
            part.step(Rows().tokens(sequence, 5, [token]))
    wrongs: list[Any] = [state[:, :5], state.astype(np.float64), np.ones(state.shape, ">f4")]
    for wrong in wrongs:
        with pytest.raises(EngineError, match="hidden states"):
            tail.step(Rows().hidden(other, 5, wrong, enter=1))
    with pytest.raises(EngineError, match="not finite"):
        tail.step(Rows().hidden(other, 5, state * np.inf, enter=1))
    with pytest.raises(EngineError, match="another part"):
        tail.step(Rows().tokens(sequence, 5, [1]))
    with pytest.raises(EngineError, match="position 6"):
        part.step(Rows().tokens(sequence, 6, [1]))
    assert sequence.length == other.length == 5
    expected = part.step(Rows().tokens(sequence, 5, [1])).tokens
    assert part.step(Rows().tokens(sequence, 5, [1])).tokens == expected  # the same position once more
    sequence.close()
    with pytest.raises(EngineError, match="closed"):
        part.step(Rows().tokens(sequence, 6, [1]))
    part.close()


def test_forks_and_rollbacks_in_the_middle() -> None:
    part = open_part(RandomModel("q4"))
    _, _, expected = run_tokens(part, part.open(), TEXT, [80])
    sequence = part.open()
    for at in range(40):
        assert part.step(Rows().tokens(sequence, at, [TEXT[at]])).tokens == [expected[at]]
    fork = sequence.fork()
    for at in range(40, 50):  # over what the fork shares
        part.step(Rows().tokens(sequence, at, [7]))
    sequence.truncate(33)
    for at in range(33, 80):
        assert part.step(Rows().tokens(sequence, at, [TEXT[at]])).tokens == [expected[at]]
    for at in range(40, 80):
        assert part.step(Rows().tokens(fork, at, [TEXT[at]])).tokens == [expected[at]]


def test_layers_behind_a_rewritten_row_forget() -> None:
    model = RandomModel("q4", random_config())
    part = open_part(model)
    sequence = part.open()
    for at in range(6):
        part.step(Rows().tokens(sequence, at, [1]))
    sequence.truncate(4)
    part.step(Rows().tokens(sequence, 4, [2], leave=1, want=Want.HIDDEN))
    part.step(Rows().tokens(sequence, 5, [2], leave=1, want=Want.HIDDEN))
    with pytest.raises(EngineError, match="hold 4"):
        part.step(Rows().tokens(sequence, 6, [2]))
