"""What is compared by `isthmus bench modes`, and how answers are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.apps.bench.modes import CE_COLLM, EXIT, LOCAL, PIPELINED, STREAM, Way, agreed, compare, select, table, ways
from isthmus.edge.token import Stats
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import EngineError
from tests.toy_part import ToyPart

PROMPT = [3, 1, 4, 1, 5]


def greedy(count: int) -> list[int]:
    """The toy's own answer."""
    part = ToyPart()
    sequence, feed, said = part.open(), PROMPT, list[int]()
    for _ in range(count):
        feed = part.step(Rows().tokens(sequence, sequence.length, feed, want=Want.SAMPLE)).tokens
        said += feed
    return said


def test_agreement_is_counted_after_the_answers_own_prefix() -> None:
    said = greedy(8)
    assert agreed(ToyPart(), PROMPT, said) == 8
    assert agreed(ToyPart(), PROMPT[:1], greedy_after(PROMPT[0])) == 1
    other = [*said[:4], (said[4] + 1) % 256, *said[5:]]
    after = ToyPart()  # what the toy says along the changed text
    sequence = after.open()
    rows = Rows().tokens(sequence, 0, [*PROMPT, *other[:-1]], want=Want.SAMPLE, want_all=True)
    right = after.step(rows).tokens[len(PROMPT) - 1 :]
    assert agreed(ToyPart(), PROMPT, other) == sum(a == b for a, b in zip(right, other, strict=True)) < 8


def greedy_after(token: int) -> list[int]:
    part = ToyPart()
    return part.step(Rows().tokens(part.open(), 0, [token], want=Want.SAMPLE)).tokens


def test_ways_without_exits_leave_out_what_needs_them() -> None:
    names = [way.name for way in ways(24, None, whole=True)]
    assert names[:2] == [STREAM, LOCAL] and {CE_COLLM, EXIT, PIPELINED} <= set(names)
    assert len(set(names)) == len(names)
    bare = [way.name for way in ways(None, None, whole=True, exits=False)]
    assert len(bare) == 5 and not any("exit" in name or name == CE_COLLM for name in bare)
    assert LOCAL not in [way.name for way in ways(24, None, whole=False)]


def test_the_published_policy_is_as_published_whatever_ours_is() -> None:
    found = {way.name: way for way in ways(20, 0.95, whole=True)}
    published, ours = found[CE_COLLM], found[EXIT]
    assert published.options == {"mode": "exit", "cut": 20, "threshold": 0.8, "codec": "f16", "guesses": 0}
    assert published.anew and not ours.anew
    assert ours.options == {"mode": "exit", "cut": 20, "threshold": 0.95}


def test_ways_are_chosen_by_words() -> None:
    every = ways(24, None, whole=True)
    assert select(every, "") == select(every, " , ") == every
    assert [way.name for way in select(every, "STREAM, ce-c")] == [STREAM, CE_COLLM]
    with pytest.raises(EngineError, match="'teleport' names no way") as caught:
        select(every, "teleport")
    assert CE_COLLM in str(caught.value.remedy)


class Scripted:
    """A device that says what it is told to.

    Args:
        texts: an answer for each prompt.
    """

    def __init__(self, texts: list[list[int]], **stats: Any) -> None:
        self._texts, self._stats = list(texts), stats
        self.resets, self.asked = 0, list[Any]()
        self.stats, self.tokens = Stats(), list[int]()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def reset(self) -> None:
        self.resets += 1

    def chat(self, messages: Any, **_: Any) -> list[SimpleNamespace]:
        self.asked.append(messages)
        said = self._texts.pop(0)
        self.stats = Stats(tokens=said, prompt_tokens=len(PROMPT), ttft_ms=0.0, **self._stats)
        self.tokens = [*PROMPT, *said]
        return [SimpleNamespace(id=token) for token in said]


def test_a_row_holds_what_the_answers_cost_per_token() -> None:
    said = greedy(6)
    wrong = [*said[:5], (said[5] + 1) % 256]
    devices = {
        STREAM: Scripted([said, said], bytes_up=12, round_trips=1),
        "anew": Scripted([said, wrong], bytes_up=60, round_trips=3, cloud_ms=6.0, drafted=4, accepted=3, note="late"),
    }
    contenders = [Way(STREAM, {}), Way("anew", {}, anew=True)]
    opened: Any = lambda way: devices[way.name]  # noqa: E731
    heard: list[str] = []
    rows = compare(contenders, opened, ["a", "b"], 6, teacher=ToyPart(), progress=heard.append)
    stream, anew = rows
    assert (stream.prompts, stream.tokens, stream.same, stream.agreement) == (2, 12, 2, 1.0)
    assert (anew.same, anew.up_bytes_per_token, anew.requests_per_token, anew.cloud_ms_per_token) == (1, 10, 0.5, 1)
    assert (anew.acceptance, anew.agreement, anew.notes) == (0.75, 11 / 12, ["late"])
    assert (devices[STREAM].resets, devices["anew"].resets) == (0, 2)
    assert devices["anew"].asked == [[{"role": "user", "content": text}] for text in "ab"]
    assert heard[0] == f"prompt 1 of 2: {STREAM}" and len(heard) == 4
    assert stream.of_best == 1.0 and anew.of_best == anew.tok_s / stream.tok_s
    shown = table("round trip 5 ms", rows).splitlines()
    assert "round trip 5 ms" in shown[1] and "of best" in shown[1] and shown[-1].strip() == "late"
    assert "75%" in shown[3] and "91.7%" in shown[3]


def test_without_a_stream_nothing_is_held_against_it() -> None:
    opened: Any = lambda way: Scripted([greedy(3)])  # noqa: E731
    (row,) = compare([Way(EXIT, {})], opened, ["a"], 3)
    assert row.same is None and row.of_best is None and row.agreement is None and row.to_dict()["same"] is None
