"""A cloud that answers nonsense: the device says so, and goes on alone where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from isthmus.protocol import messages as m
from isthmus.protocol.errors import LinkError
from tests.edge_exits import exiting
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyService
from tests.toy_part import CONFIG

Changes = dict[type, Callable[[Any], Any]]


class Odd(ToyService):
    """Changes its answers, each kind from one on.

    Args:
        changes: of each kind.
        sound: how many answers of a kind stay as they are.
    """

    def __init__(self, changes: Changes, sound: int = 2) -> None:
        super().__init__()
        self._changes, self._sound = changes, sound
        self._count = dict.fromkeys(changes, 0)

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        return [(delay, self._odd(answer)) for delay, answer in super().receive(message)]

    def _odd(self, answer: Any) -> Any:
        kind = type(answer)
        if kind not in self._changes:
            return answer
        self._count[kind] += 1
        return self._changes[kind](answer) if self._count[kind] > self._sound else answer


def put(message: Any, **changed: Any) -> Any:
    return msgspec.structs.replace(message, **changed)


CASES = {
    "a token that no vocabulary has": ("stream", m.Tokens, lambda x: put(x, tokens=[99_999])),
    "a token of a split model that no vocabulary has": ("split", m.Result, lambda x: put(x, tokens=[99_999])),
    "a token after drafts that no vocabulary has": ("verify", m.Verdict, lambda x: put(x, token=99_999)),
    "tokens far ahead": ("stream", m.Tokens, lambda x: put(x, position=x.position + 500)),
    "tokens one ahead": ("stream", m.Tokens, lambda x: put(x, position=x.position + 1)),
    "tokens of the prompt": ("stream", m.Tokens, lambda x: put(x, position=x.position - 8)),
    "tokens of the beginning": ("stream", m.Tokens, lambda x: put(x, position=0)),
    "more tokens than asked for": ("stream", m.Tokens, lambda x: put(x, tokens=x.tokens * 30)),
    "tokens of a session that is too long": ("stream", m.Tokens, lambda x: put(x, committed=2**31)),
    "a stream that ends at once": ("stream", m.Tokens, lambda x: put(x, tokens=[], done=True, reason="length")),
    "a stream that ends for no reason": ("stream", m.Tokens, lambda x: put(x, tokens=[], done=True)),
    "more drafts accepted than sent": ("verify", m.Verdict, lambda x: put(x, accepted=m.MAX_DRAFT)),
    "no draft accepted": ("verify", m.Verdict, lambda x: put(x, accepted=0)),
    "more drafts accepted than a block may have": ("verify", m.Verdict, lambda x: put(x, accepted=m.MAX_DRAFT + 1)),
    "no guess accepted": ("exit", m.Verdict, lambda x: put(x, accepted=0)),
    "a position below zero": ("stream", m.Tokens, lambda x: put(x, position=-1)),
    "a verdict on what was never sent": ("verify", m.Verdict, lambda x: put(x, position=x.position + 500)),
    "a verdict on what was never guessed": ("exit", m.Verdict, lambda x: put(x, position=x.position + 500)),
    "more guesses accepted than sent": ("exit", m.Verdict, lambda x: put(x, accepted=m.MAX_DRAFT)),
    "a token after guesses that no vocabulary has": ("exit", m.Verdict, lambda x: put(x, token=99_999)),
    "a result of what was never sent": ("split", m.Result, lambda x: put(x, position=x.position + 500)),
    "more rows computed than sent": ("split", m.Result, lambda x: put(x, committed=x.committed + 500)),
    "several tokens for one row": ("split", m.Result, lambda x: put(x, tokens=x.tokens * 2)),
}


def one_in(mode: str, cloud: ToyService, **options: Any) -> Any:
    """A device; one in exit mode asks about nearly every token, so that it says what the whole model does."""
    wire = LossyWire(cloud)
    return exiting(wire, 1.0, **options) if mode == "exit" else device(wire, mode, **options)


@pytest.mark.parametrize("case", list(CASES))
def test_the_device_says_so_and_goes_on_alone(case: str) -> None:
    mode, kind, change = CASES[case]
    with one_in(mode, Odd({kind: change})) as one:
        told = ids(one.generate(PROMPT, max_tokens=20))
        assert told == local(max_tokens=20)
        assert "answers nonsense" in one.stats.note and "went on by itself" in one.stats.note
        assert one.stats.sources[-1] == "device"


@pytest.mark.parametrize("case", [case for case, (mode, *_) in CASES.items() if mode != "exit"])
def test_it_is_an_error_where_the_device_cannot_go_on(case: str) -> None:
    mode, kind, change = CASES[case]
    with (
        one_in(mode, Odd({kind: change}), bundle=ToyBundle(held=4)) as one,
        pytest.raises(LinkError, match="answers nonsense"),
    ):
        ids(one.generate(PROMPT, max_tokens=20))


@pytest.mark.parametrize("case", [case for case, (mode, *_) in CASES.items() if mode == "exit"])
def test_a_device_that_holds_an_exit_goes_on_through_it(case: str) -> None:
    _, kind, change = CASES[case]
    with one_in("exit", Odd({kind: change}), bundle=ToyBundle(held=4)) as one:
        said = list(one.generate(PROMPT, max_tokens=20))
        assert len(said) == 20 and [token.verified for token in said].count(False) == one.stats.unverified > 0
        assert one.stats.note.count("answers nonsense") == 1 and "is back" not in one.stats.note


MODES = ["stream", "split", "verify", "exit"]
STRANGE: Changes = {m.Opened: lambda x: put(x, committed=5, prefix_hash=bytes(16))}  # as if it had gone on by itself


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("committed", [CONFIG.context_length + 1, 2**32 - 1])
def test_a_session_that_holds_more_than_it_can(mode: str, committed: int) -> None:
    with one_in(mode, Odd({m.Opened: lambda x: put(x, committed=committed)}, 0)) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)
        assert f"holds {committed} tokens and has room for {CONFIG.context_length}" in one.stats.note
        assert set(one.stats.sources) == {"device"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [1, 500])
def test_a_session_that_holds_more_than_it_was_told_to_keep(mode: str, more: int) -> None:
    beyond: Changes = {m.Result: lambda x: put(x, committed=x.position + more, prefix_hash=bytes(16))}
    cloud = Odd(STRANGE | beyond, 0)
    with one_in(mode, cloud) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)
        assert "after it was asked to keep" in one.stats.note
        assert set(one.stats.sources) == {"device"}


def test_a_fresh_session_that_always_holds_something_is_given_up() -> None:
    cloud = Odd({m.Opened: lambda x: put(x, committed=2**31, prefix_hash=bytes(16))}, 0)
    with one_in("stream", cloud, overflow="slide", kv_tokens=64) as one:
        assert len(ids(one.generate(PROMPT, max_tokens=20))) == 20
        assert "do not come to agree" in one.stats.note and "went on by itself" in one.stats.note


@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_is_not_what_it_was_is_begun_anew(mode: str) -> None:
    with one_in(mode, Odd(STRANGE, 0)) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)
        assert one.stats.note == "" and "device" not in one.stats.sources


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_stream_that_is_cut_off_is_asked_for_again_but_not_for_ever(reason: str) -> None:
    def cut_off(message: m.Tokens) -> Any:
        return put(message, tokens=[], done=True, reason=reason)

    cloud = Odd({m.Tokens: cut_off})
    with one_in("stream", cloud) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)
        assert "do not come to agree" in one.stats.note and "went on by itself" in one.stats.note


@pytest.mark.parametrize(("mode", "kind"), [("split", m.Result), ("exit", m.Verdict)])
def test_a_cloud_that_always_names_another_log_is_given_up(mode: str, kind: type) -> None:
    def other(message: Any) -> Any:
        return put(message, prefix_hash=bytes(16)) if getattr(message, "tokens", True) else message

    with one_in(mode, Odd({kind: other})) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)
        assert "do not come to agree" in one.stats.note and "went on by itself" in one.stats.note


def test_a_conversation_that_is_cut_back_into_a_stream_is_no_nonsense() -> None:
    with one_in("stream", ToyService()) as one:
        said = ids(one.generate(PROMPT, max_tokens=20))
        again = [*PROMPT.encode(), *said[:15], 7, 8]
        assert ids(one.generate(again, max_tokens=20)) == local(again, max_tokens=20)
        assert one.stats.note == "" and "device" not in one.stats.sources
