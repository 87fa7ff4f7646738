"""A session's state machine over a fake part: whatever is repeated, split or cut, the text is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.feed import take
from isthmus.cloud.session import Session
from isthmus.cloud.shape import Shape
from isthmus.cloud.work import Refusal
from isthmus.engine.part import Rows as EngineRows
from isthmus.engine.part import Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.messages import (
    WANT_HIDDEN,
    WANT_NONE,
    WANT_SAMPLE,
    Code,
    Fault,
    Generate,
    Result,
    Rows,
    Sampler,
    Tokens,
    Truncate,
)
from tests.fakes import FakePart, fake_text

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
TEXT = fake_text(PROMPT, 30)
WARM = Sampler(0.8, 0, 1.0, 77, 0)


def session(enter: int = 0, context: int = 2048, window: int = 0) -> Session:
    part = FakePart()
    shape = Shape(part.config.vocab_size, part.config.d_model, context)
    opened = Session(bytes(16), "anna", shape, part.open(window=window), enter=enter, window=window)
    opened.resume(1, b"route", 4)
    return opened


def run(one: Session, rows: int = 1000, steps: int = 1000) -> list[Any]:
    """Computes what waits, at most `rows` rows a step; the replies."""
    replies, part = [], one.sequence._part  # type: ignore[attr-defined]
    while one.work and steps:
        steps -= 1
        into = EngineRows()
        chunk = min(rows, one.work[0].rows)
        n_tokens, n_hidden = take(one, chunk, into)
        result = part.step(into)
        assert (len(result.tokens), len(result.hidden)) == (n_tokens, n_hidden)
        replies.append(one.commit(chunk, result.tokens, result.hidden, 5))
    return [reply for reply in replies if reply is not None]


def ask(log: list[int], count: int, **fields: Any) -> Rows:
    """Rows for the last `count` tokens of a log."""
    at = len(log) - count
    return Rows(4, fields.pop("epoch", 1), at, Chain(log[:at]).head, log[at:], **fields)


def refused(code: Code, call: Any, *arguments: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert caught.value.code == code
    assert caught.value.problem
    return caught.value


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_decode_by_rows_gives_the_models_text(chunk: int) -> None:
    one, log = session(), list(PROMPT)
    said: list[int] = []
    one.rows(ask(log, len(PROMPT)), 0.0)
    while len(said) < 10:
        (result,) = run(one, chunk)
        assert (result.position, result.committed) == (len(log) - (len(PROMPT) if not said else 1), len(log))
        assert result.prefix_hash == Chain(log).head
        said += result.tokens
        log += result.tokens
        assert one.rows(ask(log, 1), 0.0) is None
    assert said == TEXT[:10]


def test_rows_under_way_are_computed_in_order() -> None:
    one, log = session(), PROMPT + TEXT
    for end in range(1, 20):
        want = WANT_SAMPLE if end >= len(PROMPT) else WANT_NONE
        assert one.rows(ask(log[:end], 1, want=want), 0.0) is None
    results = run(one)
    assert [result.position for result in results] == list(range(19))
    assert [token for result in results for token in result.tokens] == TEXT[:12]


def test_a_repetition_is_answered_from_the_log() -> None:
    one, log = session(), PROMPT + TEXT
    message = ask(log[:8], 8)
    assert one.rows(message, 0.0) is None
    assert one.rows(message, 0.0) is None  # waits already
    assert len(one.work) == 1
    (first,) = run(one)
    again = one.rows(message, 0.0)
    assert isinstance(again, Result)
    assert (again.position, again.tokens, again.committed) == (0, first.tokens, 8)
    one.rows(ask(log[:9], 1), 0.0)
    run(one)
    later = one.rows(message, 0.0)
    assert isinstance(later, Result)
    assert (later.tokens, later.committed) == (first.tokens, 9)
    assert not one.work


def test_overlapping_rows_compute_only_what_is_new() -> None:
    one, log = session(), PROMPT + TEXT
    one.rows(ask(log[:6], 6, want=WANT_NONE), 0.0)
    run(one)
    assert one.rows(ask(log[:8], 5), 0.0) is None
    assert one.work[0].rows == 2
    assert [reply.tokens for reply in run(one)] == [TEXT[:1]]


def test_the_last_rows_are_computed_again_for_another_sampler() -> None:
    one, log = session(), list(PROMPT)
    one.rows(ask(log, 8), 0.0)
    assert run(one)[0].tokens == TEXT[:1]
    assert one.rows(ask(log, 8, sampler=WARM), 0.0) is None
    assert run(one)[0].tokens == fake_text(PROMPT, 1, Sampling(0.8, seed=77))
    assert one.rows(ask(log, 8), 0.0) is None
    assert run(one)[0].tokens == TEXT[:1]


def test_samplers_of_rows_under_way_are_kept_apart() -> None:
    one, log = session(), PROMPT + TEXT
    one.rows(ask(log[:8], 8, sampler=WARM), 0.0)
    one.rows(ask(log[:9], 1), 0.0)
    warm, greedy = run(one)
    assert warm.tokens == fake_text(PROMPT, 1, Sampling(0.8, seed=77))
    assert greedy.tokens == TEXT[1:2]
    reply = one.rows(ask(log[:9], 1), 0.0)
    assert isinstance(reply, Result)
    assert reply.tokens == TEXT[1:2]
    refused(Code.DIVERGED, one.rows, ask(log[:8], 8, sampler=WARM), 0.0)


def test_every_row_can_be_wanted() -> None:
    one, log = session(), PROMPT + TEXT
    one.rows(ask(log[:20], 20, want=WANT_SAMPLE | WANT_HIDDEN, want_all=True), 0.0)
    (result,) = run(one, 3)
    assert result.tokens[7:] == TEXT[:13]
    states = tensors.decode(result.hidden, 64)
    assert states.shape == (20, 64)
    assert len(np.unique(states, axis=0)) == 20
    again = one.rows(ask(log[:20], 13, want_all=True), 0.0)
    assert isinstance(again, Result)
    assert again.tokens == TEXT[:13]


@pytest.mark.parametrize("codec", tensors.CODECS)
def test_hidden_rows_continue_the_model(codec: str) -> None:
    one, device, log = session(enter=2), FakePart(0, 2), list(PROMPT)
    local, feed = device.open(), list(PROMPT)
    for expected in TEXT[:5]:
        states = device.step(
            EngineRows().tokens(local, local.length, feed, leave=2, want=Want.HIDDEN, want_all=True)
        ).hidden
        one.rows(ask(log, len(feed), hidden=tensors.encode(states, codec, plain=1)), 0.0)
        (result,) = run(one, 3)
        assert result.tokens == [expected]
        feed = result.tokens
        log += feed


def test_rows_that_do_not_fit_are_refused() -> None:
    one, split = session(), session(enter=2)
    state = tensors.encode(np.ones((1, 64), np.float32), "f16")
    refused(Code.BAD_MESSAGE, one.rows, Rows(4, 1, 0, Chain().head, []), 0.0)
    refused(Code.BAD_MESSAGE, one.rows, ask([1], 1, want=2), 0.0)
    refused(Code.BAD_MESSAGE, one.rows, ask([1000], 1), 0.0)
    refused(Code.BAD_MESSAGE, one.rows, ask([1], 1, hidden=state), 0.0)
    refused(Code.BAD_MESSAGE, split.rows, ask([1], 1), 0.0)
    refused(Code.BAD_MESSAGE, split.rows, ask([1, 2], 2, hidden=state), 0.0)
    refused(Code.GAP, one.rows, Rows(4, 1, 5, Chain().head, [1]), 0.0)
    refused(Code.DIVERGED, one.rows, Rows(4, 1, 0, bytes(15) + b"x", [1]), 0.0)
    refused(Code.UNSUPPORTED, split.generate, Generate(4, 1, 0, Chain().head, [1], 5), 0.0)
    refused(Code.BAD_MESSAGE, one.generate, Generate(4, 1, 0, Chain().head, [1], 0), 0.0)
    refused(Code.BAD_MESSAGE, one.generate, Generate(4, 1, 0, Chain().head, [], 5), 0.0)
    assert not one.work
    assert len(one.chain) == 0


def test_other_tokens_at_committed_positions_are_refused_until_truncated() -> None:
    one, log = session(), list(PROMPT)
    one.rows(ask(log, 8), 0.0)
    run(one)
    other = [*PROMPT[:5], 7, 7]
    refused(Code.DIVERGED, one.rows, ask(other, 7), 0.0)
    refused(Code.DIVERGED, one.rows, ask(other, 1), 0.0)
    reply = one.truncate(Truncate(4, 2, 5))
    assert isinstance(reply, Result)
    assert (reply.epoch, reply.committed, reply.prefix_hash) == (2, 5, Chain(PROMPT[:5]).head)
    assert one.rows(ask(other, 2, epoch=2), 0.0) is None
    assert run(one)[0].tokens == fake_text(other, 1)


def test_epochs_fence() -> None:
    one = session()
    one.rows(ask(PROMPT, 8), 0.0)
    refused(Code.STALE_EPOCH, one.rows, ask(PROMPT, 8, epoch=0), 0.0)
    refused(Code.STALE_EPOCH, one.rows, ask(PROMPT, 8, epoch=2), 0.0)
    refused(Code.STALE_EPOCH, one.truncate, Truncate(4, 0, 0))
    refused(Code.STALE_EPOCH, one.resume, 0, b"other", 1)
    assert one.route == b"route"
    assert len(one.work) == 1
    one.resume(3, b"other", 1)
    assert not one.work
    assert len(one.chain) == one.committed == 0
    refused(Code.STALE_EPOCH, one.rows, ask(PROMPT, 8), 0.0)


def test_a_repeated_truncate_changes_nothing() -> None:
    one = session()
    one.rows(ask(PROMPT, 8), 0.0)
    run(one)
    one.truncate(Truncate(4, 2, 0))
    one.rows(ask(PROMPT, 8, epoch=2), 0.0)
    run(one)
    reply = one.truncate(Truncate(4, 2, 0))
    assert isinstance(reply, Result)
    assert reply.committed == one.committed == 8


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_stream_gives_the_models_text(chunk: int) -> None:
    one = session()
    assert one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 12), 0.0) is None
    replies = run(one, chunk)
    assert [token for reply in replies for token in reply.tokens] == TEXT[:12]
    assert [reply.position for reply in replies] == list(range(8, 20))
    assert [reply.reason for reply in replies] == [""] * 11 + ["length"]
    assert [reply.done for reply in replies] == [False] * 11 + [True]
    assert replies[-1].committed == 19
    assert replies[-1].prefix_hash == Chain(PROMPT + TEXT[:11]).head
    # The next turn sends the last token and what the user says.
    log = [*PROMPT, *TEXT[:12], 42]
    assert one.generate(Generate(4, 1, 19, Chain(log[:19]).head, log[19:], 3), 0.0) is None
    assert [token for reply in run(one) for token in reply.tokens] == fake_text(log, 3)


def test_a_stream_stops_at_a_stop_token() -> None:
    one = session()
    one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 12, stop=(TEXT[4],)), 0.0)
    replies = run(one)
    assert [token for reply in replies for token in reply.tokens] == TEXT[:5]
    assert replies[-1].reason == "stop"


@given(st.integers(0, 11), st.integers(1, 14), st.integers(1, 9))
def test_a_stream_begun_again_goes_on_from_the_log(steps: int, more: int, chunk: int) -> None:
    one = session()
    first = Generate(4, 1, 0, Chain().head, PROMPT, 12)
    one.generate(first, 0.0)
    run(one, chunk, steps)
    one.resume(2, b"new", 4)
    assert one.chain.tokens == (PROMPT + TEXT)[: one.committed]
    again = Generate(4, 2, 0, Chain().head, PROMPT, more)
    reply = one.generate(again, 0.0)
    replies = [*([reply] if reply is not None else []), *run(one, chunk)]
    assert all(isinstance(reply, Tokens) for reply in replies)
    assert [token for reply in replies for token in reply.tokens] == TEXT[:more]
    assert next(reply.position for reply in replies if reply.tokens) == 8
    assert replies[-1].done
    assert replies[-1].reason == "length"


def test_a_repeated_generate_tells_what_it_has_and_goes_on() -> None:
    one = session()
    message = Generate(4, 1, 0, Chain().head, PROMPT, 6)
    one.generate(message, 0.0)
    run(one, steps=3)
    reply = one.generate(message, 0.0)
    assert isinstance(reply, Tokens)
    assert (reply.position, reply.tokens, reply.done) == (8, TEXT[:3], False)
    assert len(one.work) == 1
    assert [token for reply in run(one) for token in reply.tokens] == TEXT[3:6]
    whole = one.generate(message, 0.0)
    assert isinstance(whole, Tokens)
    assert (whole.tokens, whole.done, whole.reason) == (TEXT[:6], True, "length")


def test_a_stream_after_prefill_computes_the_last_row_again() -> None:
    one = session()
    one.rows(ask(PROMPT, 8, want=WANT_NONE), 0.0)
    run(one)
    assert one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 4), 0.0) is None
    assert one.work[0].rows == 1
    assert [token for reply in run(one) for token in reply.tokens] == TEXT[:4]


def test_cancelling_ends_a_stream_and_keeps_the_log() -> None:
    one = session()
    one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 12), 0.0)
    run(one, steps=3)
    (last,) = one.cancel()
    assert isinstance(last, Tokens)
    assert (last.done, last.reason, last.tokens, last.position) == (True, "cancelled", [], 11)
    assert one.committed == len(one.chain) == 10
    assert one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 4), 0.0) is not None
    assert [token for reply in run(one) for token in reply.tokens] == TEXT[3:4]


def test_deadlines_end_a_request_and_those_that_build_on_it() -> None:
    one, log = session(), PROMPT + TEXT
    one.rows(ask(log[:8], 8), 0.0)
    one.rows(ask(log[:9], 1, budget_ms=100), 0.0)
    one.rows(ask(log[:10], 1), 0.0)
    assert one.expire(0.099) == []
    late = one.expire(0.1)
    assert [(fault.code, fault.position) for fault in late if isinstance(fault, Fault)] == [
        (Code.DEADLINE, 8),
        (Code.DEADLINE, 9),
    ]
    assert [reply.position for reply in run(one)] == [0]
    assert one.chain.tokens == PROMPT
    one.generate(Generate(4, 1, 8, Chain(PROMPT).head, TEXT[:1], 9, budget_ms=50), 1.0)
    run(one, steps=2)
    (last,) = one.expire(1.06)
    assert isinstance(last, Tokens)
    assert (last.done, last.reason) == (True, "deadline")


def test_a_failure_keeps_what_is_committed() -> None:
    one, log = session(), PROMPT + TEXT
    one.rows(ask(log[:8], 8), 0.0, 100)
    run(one)
    one.freed_bytes = 0
    one.rows(ask(log[:9], 1), 0.0, 10)
    one.rows(ask(log[:10], 1), 0.0, 20)
    faults = one.fail(Refusal(Code.BUSY, "full", "wait", 250))
    assert [(fault.position, fault.retry_ms, fault.committed) for fault in faults if isinstance(fault, Fault)] == [
        (8, 250, 8),
        (9, 250, 8),
    ]
    assert one.freed_bytes == 30
    assert one.rows(ask(log[:9], 1), 0.0) is None
    assert run(one)[0].tokens == TEXT[1:2]


def test_the_context_ends_with_a_clear_word() -> None:
    one = session(context=12)
    assert "overflow='slide'" in refused(Code.KV_FULL, one.rows, ask(list(range(13)), 13), 0.0).remedy
    one.generate(Generate(4, 1, 0, Chain().head, PROMPT, 100), 0.0)
    replies = run(one)
    assert replies[-1].reason == "full"
    assert replies[-1].committed == 12
    assert [token for reply in replies for token in reply.tokens] == TEXT[:5]
    sliding = session(context=12, window=8)
    sliding.generate(Generate(4, 1, 0, Chain().head, PROMPT, 30), 0.0)
    assert [token for reply in run(sliding) for token in reply.tokens] == TEXT


def test_too_many_requests_are_told_to_wait() -> None:
    one, log = session(), [1] * 100
    for end in range(1, 65):
        one.rows(ask(log[:end], 1, want=WANT_NONE), 0.0)
    assert refused(Code.BUSY, one.rows, ask(log[:65], 1), 0.0).retry_ms > 0
    assert len(run(one)) == 64


@given(st.data())
def test_any_order_of_repeated_requests_gives_the_same_text(data: st.DataObject) -> None:
    one, log = session(), PROMPT + TEXT[:12]
    epoch, known = 1, 0
    for _ in range(60):
        action = data.draw(st.sampled_from(["rows", "rows", "step", "step", "truncate", "resume", "cancel"]))
        if action == "rows":
            at = data.draw(st.integers(0, known))
            end = data.draw(st.integers(at + 1, min(len(log), at + 5)))
            try:
                reply = one.rows(ask(log[:end], end - at, epoch=epoch), 0.0)
            except Refusal as error:
                assert error.code in (Code.DIVERGED, Code.BUSY)
                continue
            replies: list[Any] = [reply] if reply is not None else []
        elif action == "step":
            replies = run(one, data.draw(st.integers(1, 4)), 1)
        else:
            if action == "cancel":
                one.cancel()
            else:
                epoch += 1
                if action == "resume":
                    one.resume(epoch, b"x", 4)
                else:
                    one.truncate(Truncate(4, epoch, data.draw(st.integers(0, len(log)))))
            replies = []
        known = min(len(one.chain), len(log) - 1)
        assert one.sequence.length == one.committed <= len(one.chain)
        assert one.chain.tokens == log[: len(one.chain)]
        for reply in replies:
            assert isinstance(reply, Result)
            assert reply.prefix_hash == Chain(log[: reply.committed]).head
    # Whatever happened, the rest of the text can be had.
    run(one)
    at = min(one.committed, len(log) - 1)
    epoch += 1
    one.truncate(Truncate(4, epoch, at))
    one.rows(ask(log, len(log) - at, epoch=epoch), 0.0)
    assert run(one)[-1].tokens == TEXT[12:13]
