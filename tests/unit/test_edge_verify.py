"""Verify mode over the real service and a link that loses, repeats and overtakes: the text is the cloud model's own."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.drafts import NgramDrafts
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyService

WARM = Sampling(0.9, seed=3)


class HalfRight:
    """Drafts that know the text, and are wrong now and then.

    Args:
        text: the conversation as it will be.
        wrong: probability of each guess to be another token.
    """

    def __init__(self, text: list[int], wrong: float, seed: int) -> None:
        self._text, self._wrong, self._random, self._length = text, wrong, random.Random(seed), 0
        self.drafted = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Iterable[int]) -> None:
        self._length += len(list(tokens))

    def truncate(self, length: int) -> None:
        assert length <= self._length
        self._length = length

    def draft(self, count: int) -> list[int]:
        known = self._text[self._length : self._length + count]
        self.drafted += len(known)
        return [(t + 1) % 256 if self._random.random() < self._wrong else t for t in known]

    def odds(self, count: int) -> float | None:
        return None if self._wrong == 0.3 else float((1.0 - self._wrong) ** count)


def verifying(wire: LossyWire, wrong: float, depth: int, text: list[int], seed: int = 0, **options: Any) -> Any:
    one = device(wire, "verify", draft_depth=depth, **options)
    one._drafting._ngrams = HalfRight([*PROMPT.encode(), *text], wrong, seed)  # type: ignore[assignment]
    return one


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_the_text_is_the_clouds_own(sampling: Sampling, depth: int, wrong: float) -> None:
    text = local(max_tokens=60, sampling=sampling)
    with verifying(LossyWire(ToyService()), wrong, depth, text) as one:
        assert ids(one.generate(PROMPT, max_tokens=60, sampling=sampling)) == text
        stats = one.stats
        assert set(stats.sources) <= {"cloud", "verified"}
        assert stats.drafts >= stats.drafted > 0 and stats.drafting_ms > 0
        if wrong == 1.0:
            assert stats.accepted == 0 < stats.drafted
        if wrong == 0.0:
            assert stats.accepted == stats.drafted > len(text) / 2
            assert stats.round_trips < len(text) / 2


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    drop=st.sampled_from([0.0, 0.1, 0.3]),
    repeat=st.sampled_from([0.0, 0.3]),
    slow_s=st.sampled_from([0.005, 0.3]),
    depth=st.sampled_from([1, 2, 8]),
    wrong=st.sampled_from([0.0, 0.2, 0.6]),
    reconnect=st.sampled_from([7, 23, 1 << 60]),
    restart=st.sampled_from([5, 17, 1 << 60]),
    warm=st.booleans(),
)
def test_whatever_happens_to_messages_the_text_is_the_same(
    seed: int,
    drop: float,
    repeat: float,
    slow_s: float,
    depth: int,
    wrong: float,
    reconnect: int,
    restart: int,
    warm: bool,
) -> None:
    sampling = WARM if warm else Sampling()
    text = local(max_tokens=40, sampling=sampling)
    wire = LossyWire(ToyService(), seed, drop=drop, repeat=repeat, delay_s=(0.001, slow_s))
    wire.reconnect_every, wire.restart_after = reconnect, restart
    with verifying(wire, wrong, depth, text, seed) as one:
        assert ids(one.generate(PROMPT, max_tokens=40, sampling=sampling)) == text


def test_one_conversation_in_every_mode() -> None:
    text = local(max_tokens=42)
    with verifying(LossyWire(ToyService()), 0.3, 4, text) as one:
        got: list[int] = ids(one.generate(PROMPT, max_tokens=6))
        for mode in ("stream", "verify", "local", "verify", "split", "verify"):
            got += ids(one.generate(max_tokens=6, mode=mode))
        assert got == text


def test_an_answer_left_early_leaves_nothing_behind() -> None:
    text = local(max_tokens=30)
    with verifying(LossyWire(ToyService()), 0.1, 8, text) as one:
        for start in range(1, 8):
            tokens = one.generate(PROMPT, max_tokens=30)
            head = [next(tokens).id for _ in range(start)]
            assert head + ids(one.generate(max_tokens=4)) == text[: start + 4]


def test_a_cloud_that_goes_away_in_the_middle() -> None:
    text = local(max_tokens=40)
    for after in range(2, 20):
        wire = LossyWire(ToyService())
        wire.die_after = after
        with verifying(wire, 0.2, 4, text) as one:
            assert ids(one.generate(PROMPT, max_tokens=40)) == text
            assert one.stats.sources[-1] in ("device", "verified", "cloud")


def test_guesses_learned_from_the_conversation() -> None:
    drafts = NgramDrafts()
    drafts.extend([1, 2, 3, 4, 1, 2])
    assert drafts.draft(2) == [3, 4]


class Terse(ToyService):
    """Says of drafts that are all right that the last is not among them, and then that very token.

    Attributes:
        short: how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.short = 0
        self._log = Chain()
        self._log.extend([*PROMPT.encode(), *local(max_tokens=40)])

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        answers = super().receive(message)
        return [(delay, self._terse(message, answer)) for delay, answer in answers]

    def _terse(self, message: Any, answer: Any) -> Any:
        if not (isinstance(answer, m.Verdict) and isinstance(message, m.Draft) and answer.accepted > 1):
            return answer
        if answer.accepted < len(message.tokens) or answer.position != message.position:
            return answer
        self.short += 1
        kept = answer.accepted - 1
        return msgspec.structs.replace(
            answer, accepted=kept, token=message.tokens[kept], prefix_hash=self._log.at(answer.position + kept)
        )


class Seldom(HalfRight):
    """Has no draft every other time."""

    asked = 0

    def draft(self, count: int) -> list[int]:
        self.asked += 1
        return super().draft(count) if self.asked % 2 else []


@pytest.mark.parametrize("depth", [1, 4])
def test_drafts_that_were_not_judged_are_not_waited_for(depth: int) -> None:
    text, cloud = local(max_tokens=40), Terse()
    with verifying(LossyWire(cloud), 0.0, depth, text) as one:
        one._drafting._ngrams = Seldom([*PROMPT.encode(), *text], 0.0, 0)
        assert ids(one.generate(PROMPT, max_tokens=40)) == text
        assert cloud.short and one.stats.note == ""
