"""Drafts in a session over a fake part: what is accepted is the model's text, and stale blocks cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.cloud.feed import take
from isthmus.cloud.session import LAZY_ROWS, Session
from isthmus.cloud.shape import Shape
from isthmus.cloud.work import Refusal
from isthmus.engine.part import Rows as EngineRows
from isthmus.engine.part import Want
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.messages import GREEDY, WANT_NONE, Code, Draft, Fill, Result, Rows, Sampler, Truncate, Verdict
from tests.fakes import FakePart, fake_text

PROMPT = [3, 1, 4, 1, 5, 9]
TEXT = [*PROMPT, *fake_text(PROMPT, 60)]
CHAIN = Chain(TEXT)
CUT = 2


def session(enter: int = 0) -> Session:
    part = FakePart()
    opened = Session(
        bytes(16), "anna", Shape(part.config.vocab_size, part.config.d_model, 2048), part.open(), enter=enter
    )
    opened.resume(1, b"route", 4)
    return opened


def run(one: Session, rows: int = 1000) -> list[Any]:
    """Computes what is ready, at most `rows` rows a step; the replies."""
    found, part = [], one.sequence._part  # type: ignore[attr-defined]
    while one.ready:
        into = EngineRows()
        chunk = min(rows, one.work[0].rows)
        n_tokens, _ = take(one, chunk, into)
        result = part.step(into)
        assert len(result.tokens) == n_tokens
        found.append(one.commit(chunk, result.tokens, result.hidden, 5))
    return [reply for reply in found if reply is not None]


def prompted() -> Session:
    one = session()
    assert one.rows(Rows(4, 1, 0, CHAIN.at(0), PROMPT), 0.0) is None
    (result,) = run(one)
    assert isinstance(result, Result)
    assert result.tokens == TEXT[6:7]
    return one


def draft(at: int, tokens: list[int], before: list[int] | None = None, **fields: Any) -> Draft:
    head = CHAIN.at(at) if before is None else Chain(before).head
    return Draft(4, 1, at, head[:4], tokens, **fields)


def wrong(tokens: list[int], at: int) -> list[int]:
    return [*tokens[:at], (tokens[at] + 1) % 1000, *tokens[at + 1 :]]


def states(start: int, end: int) -> NDArray[np.float32]:
    """What layers [0, CUT) make of the text's tokens."""
    part = FakePart(0, CUT)
    rows = of_text(part, end)
    return part.step(rows).hidden[start:end]


def of_text(part: FakePart, end: int) -> EngineRows:
    return EngineRows().tokens(part.open(), 0, TEXT[:end], leave=CUT, want=Want.HIDDEN, want_all=True)


@settings(deadline=None)  # others may have the processors
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=12), st.integers(1, 5))
def test_what_is_accepted_is_the_text(blocks: list[tuple[int, int]], chunk: int) -> None:
    one, at = prompted(), 6
    for size, right in blocks:
        tokens = TEXT[at : at + size]
        right = max(1, min(right, size))
        tokens = wrong(tokens, right) if right < size else tokens
        assert one.draft(draft(at, tokens), 0.0) is None
        (verdict,) = run(one, chunk)
        assert isinstance(verdict, Verdict)
        assert (verdict.position, verdict.accepted, verdict.token) == (at, right, TEXT[at + right])
        assert verdict.prefix_hash == CHAIN.at(at + right)
        again = one.draft(draft(at, tokens), 0.0)
        assert isinstance(again, Verdict)
        assert (again.accepted, again.token, again.prefix_hash) == (right, verdict.token, verdict.prefix_hash)
        at += right
        assert one.committed == one.sequence.length == len(one.chain) == at
        if at > 55:
            break


def test_blocks_in_a_row_and_what_was_built_on_a_wrong_guess() -> None:
    one = prompted()
    first, second = TEXT[6:10], TEXT[10:14]
    assert one.draft(draft(6, first), 0.0) is None
    assert one.draft(draft(10, second), 0.0) is None
    assert [(v.position, v.accepted, v.token) for v in run(one)] == [(6, 4, TEXT[10]), (10, 4, TEXT[14])]
    guess = wrong(TEXT[14:18], 2)
    assert one.draft(draft(14, guess), 0.0) is None
    assert one.draft(draft(18, [1, 2], TEXT[:14] + guess), 0.0) is None
    (verdict,) = run(one)
    assert (verdict.accepted, verdict.token) == (2, TEXT[16])
    assert not one.work
    before = len(one.sequence._part.steps)  # type: ignore[attr-defined]
    assert one.draft(draft(16, [5, 5], TEXT[:14] + guess[:2]), 0.0) is None, "its first token is not what was said"
    assert one.draft(draft(18, [1, 2], TEXT[:14] + guess), 0.0) is None if len(one.chain) >= 18 else True
    assert run(one) == []
    assert len(one.sequence._part.steps) == before  # type: ignore[attr-defined]


def test_a_block_that_waits_behind_the_prompt() -> None:
    one = session()
    one.rows(Rows(4, 1, 0, CHAIN.at(0), PROMPT), 0.0)
    one.draft(draft(6, TEXT[6:9]), 0.0)
    result, verdict = run(one)
    assert (result.tokens, verdict.accepted, verdict.token) == (TEXT[6:7], 3, TEXT[9])
    two = session()
    two.rows(Rows(4, 1, 0, CHAIN.at(0), PROMPT), 0.0)
    two.draft(draft(6, [TEXT[6] + 1]), 0.0)
    (result,) = run(two)
    assert (result.tokens, two.committed) == (TEXT[6:7], 6)


def test_drafts_are_sampled_like_the_prompt() -> None:
    warm = Sampler(0.8, 0, 1.0, 77, 0)
    one = session()
    one.rows(Rows(4, 1, 0, CHAIN.at(0), PROMPT, sampler=warm), 0.0)
    (result,) = run(one)
    one.draft(draft(6, result.tokens), 0.0)
    (verdict,) = run(one)
    assert verdict.token != fake_text([*PROMPT, *result.tokens], 1)[0]
    assert one.rows(Rows(4, 1, 6, Chain(PROMPT).head, result.tokens), 0.0) is None
    (greedy,) = run(one)
    assert greedy.tokens == fake_text([*PROMPT, *result.tokens], 1)


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(Refusal) as gap:
        session().draft(draft(6, TEXT[6:8]), 0.0)
    assert gap.value.code == Code.GAP
    one = session()
    one.rows(Rows(4, 1, 0, CHAIN.at(0), PROMPT, want=WANT_NONE), 0.0)
    run(one)
    with pytest.raises(Refusal) as unknown:
        one.draft(draft(6, TEXT[6:8]), 0.0)
    assert unknown.value.code == Code.GAP
    one = prompted()
    with pytest.raises(Refusal) as vocabulary:
        one.draft(draft(6, [TEXT[6], 10**6]), 0.0)
    assert vocabulary.value.code == Code.BAD_MESSAGE
    one.draft(draft(6, TEXT[6:8]), 0.0)
    with pytest.raises(Refusal) as busy:
        one.rows(Rows(4, 1, 8, CHAIN.at(8), TEXT[8:9]), 0.0)
    assert busy.value.code == Code.BUSY
    with pytest.raises(Refusal) as bare:
        session(CUT).draft(draft(6, TEXT[6:8]), 0.0)
    assert bare.value.code == Code.BAD_MESSAGE


@settings(deadline=None)  # others may have the processors
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(1, 4)), min_size=1, max_size=10))
def test_lazy_rows_wait_for_a_question_and_are_computed_with_it(pieces: list[tuple[int, bool, int]]) -> None:
    one, at = session(CUT), 6
    part = one.sequence._part  # type: ignore[attr-defined]
    one.fill(Fill(4, 1, 0, CHAIN.at(0), PROMPT, tensors.encode(states(0, 6), "f32")), 0.0)
    for size, asked, right in pieces:
        end = min(at + size, 60)
        if end == at:
            break
        hidden = tensors.encode(states(at, end), "f32")
        steps = len(part.steps)
        if not asked:
            message = Fill(4, 1, at, CHAIN.at(at)[:4], TEXT[at:end], hidden)
            one.fill(message, 0.0)
            one.fill(message, 0.0)
            one.fill(Fill(4, 1, at, b"else", TEXT[at:end], hidden), 0.0)
            assert run(one) == []
            assert len(part.steps) == steps
            at = end
            continue
        right = min(right, end - at)
        tokens = TEXT[at:end] if right == end - at else wrong(TEXT[at:end], right)
        assert one.draft(draft(at, tokens, hidden=hidden, sampler=GREEDY), 0.0) is None
        (verdict,) = run(one)
        assert (verdict.position, verdict.accepted, verdict.token) == (at, right, TEXT[at + right])
        assert len(part.steps) == steps + 1
        at += right
        assert one.committed == at
    one.rows(Rows(4, 1, at, CHAIN.at(at), TEXT[at : at + 1], tensors.encode(states(at, at + 1), "f32")), 0.0)
    (result,) = run(one)
    assert (result.position, result.tokens, result.committed) == (at, TEXT[at + 1 : at + 2], at + 1)


@pytest.mark.parametrize("how", ["cancel", "resume", "truncate"])
@pytest.mark.parametrize("asked", [False, True])
def test_rows_that_were_sent_ahead_outlast_what_ends_a_question(how: str, asked: bool) -> None:
    one = prompted()
    before = one.size_bytes
    one.fill(Fill(4, 1, 6, CHAIN.at(6), TEXT[6:9]), 0.0, 10)
    one.fill(Fill(4, 1, 9, CHAIN.at(9), TEXT[9:12]), 0.0, 20)
    if asked:
        one.draft(Draft(4, 1, 12, CHAIN.at(12), TEXT[12:15]), 0.0, 40)
    assert one.size_bytes - before == (70 if asked else 30) and one.asked == asked
    if how == "cancel":
        one.cancel()
    elif how == "resume":
        one.resume(2, b"route", 4)
    else:
        assert one.truncate(Truncate(4, 2, 10)).committed == 10  # type: ignore[union-attr]
    end = 10 if how == "truncate" else 12
    assert (one.committed, one.held, len(one.chain), one.asked, one.ready) == (6, end, end, False, False)
    one.draft(Draft(4, one.epoch, end, CHAIN.at(end), TEXT[end:15]), 0.0)
    (verdict,) = run(one)
    assert (verdict.accepted, verdict.token) == (15 - end, TEXT[15]) and one.size_bytes == one.freed_bytes


def test_lazy_rows_do_not_wait_without_end() -> None:
    prompt = [i % 7 for i in range(3 * LAZY_ROWS)]
    part, one = FakePart(0, CUT), session(CUT)
    hidden = part.step(EngineRows().tokens(part.open(), 0, prompt, leave=CUT, want=Want.HIDDEN, want_all=True)).hidden
    chain = Chain(prompt)
    for at in range(len(prompt)):
        tensor = tensors.encode(hidden[at : at + 1], "f32")
        one.fill(Fill(4, 1, at, chain.at(at), prompt[at : at + 1], tensor), 0.0)
        assert run(one) == []
    assert one.committed >= 2 * LAZY_ROWS
    with pytest.raises(Refusal) as gap:
        one.fill(Fill(4, 1, 500, bytes(4), prompt[:1], tensor), 0.0)
    assert gap.value.code == Code.GAP
