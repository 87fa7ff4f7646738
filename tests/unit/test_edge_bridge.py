"""A device whose link fails: it goes on, and the text that stands is the cloud's all the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.bridge import SOON, Bridge, Retold
from isthmus.edge.events import Timeouts
from isthmus.edge.standby import MOST
from isthmus.edge.token import Rollback
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, LinkError
from tests.edge_exits import CUT, exiting, give_exit
from tests.edge_toys import PROMPT, device, ids, lie, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyService
from tests.toy_part import N_LAYERS

RTT_S = 0.04
TOKEN_S = 0.004  # of the device's own


def wired(**options: Any) -> LossyWire:
    wire = LossyWire(ToyService(0.005), delay_s=(RTT_S / 2, RTT_S / 2), **options)
    wire.poll_s = TOKEN_S
    return wire


def cut_after(wire: LossyWire, tokens: Any, count: int, for_s: float) -> list[Any]:
    """Takes so many tokens; then the link is dark for a time."""
    head = [next(tokens) for _ in range(count)]
    wire.dark.append((wire.now, wire.now + for_s))
    return head


@pytest.mark.parametrize("mode", ["auto", "stream", "verify", "split"])
@pytest.mark.parametrize("for_s", [0.3, 1.5, 6.0])
def test_a_cut_link_costs_two_round_trips_and_no_token(mode: str, for_s: float) -> None:
    text, wire = local(max_tokens=200), wired()
    with device(wire, mode, on_rollback=pytest.fail) as one:
        tokens = one.generate(PROMPT, max_tokens=200)
        head = cut_after(wire, tokens, 5, for_s)
        dark = wire.now
        while (token := next(tokens)).verified:
            head.append(token)
            dark = wire.now  # what was under way still came
        assert wire.now - dark <= max(0.05, 2 * RTT_S) + RTT_S
        rest = [token, *tokens]
        assert ids(head + rest) == text == one.stats.tokens
        assert one.stats.unverified == one.stats.replaced == 0
        assert one.stats.text == "".join(token.text for token in head + rest)
        assert [token.position for token in head + rest] == list(range(11, 11 + len(text)))
        if for_s < 1:
            assert rest[-1].verified  # the cloud had caught up by then


@pytest.mark.parametrize("mode", ["verify", "split"])
def test_a_cloud_that_stops_is_away_until_another_is_there(mode: str) -> None:
    text, wire = local(max_tokens=120), wired()
    cloud: Any = wire.cloud
    with device(wire, mode, on_rollback=pytest.fail) as one:
        tokens = one.generate(PROMPT, max_tokens=120)
        said = [next(tokens) for _ in range(5)]
        cloud._service.stop()
        while (token := next(tokens)).verified:
            said.append(token)
        said += [token, *(next(tokens) for _ in range(10))]
        cloud.forget()
        wire.reconnect()
        said += tokens
        assert ids(said) == text == one.stats.tokens and said[-1].verified
        assert one.stats.unverified == 0
        assert "is stopping" in one.stats.note and one.stats.note.count("is back after") == 1


def test_what_was_guessed_is_confirmed_in_few_passes() -> None:
    wire = wired()
    with device(wire, "stream") as one:
        tokens = one.generate(PROMPT, max_tokens=300)
        cut_after(wire, tokens, 5, 1.0)
        while next(tokens).verified:
            pass
        wire.reconnect()
        list(tokens)
        assert one.stats.tokens == local(max_tokens=300)
        drafts = [message for message in wire.sent if isinstance(message, m.Draft)]
        assert 1 <= len(drafts) <= 12
        assert sum(len(draft.tokens) for draft in drafts) > 100


@pytest.mark.parametrize("mode", ["stream", "verify", "split"])
def test_wrong_guesses_are_taken_back(mode: str) -> None:
    text, wire, taken = local(max_tokens=60), wired(), list[Rollback]()

    def replace(rollback: Rollback) -> bool:
        taken.append(rollback)
        return True

    with device(wire, mode, on_rollback=replace) as one:
        lie(one)
        tokens = one.generate(PROMPT, max_tokens=60)
        said = cut_after(wire, tokens, 5, 0.5)
        for token in tokens:
            if taken:
                wrong = taken.pop()
                at = wrong.position - said[0].position
                assert [one.id for one in said[at:]] == list(wrong.tokens)
                assert "".join(one.text for one in said[at:]) == wrong.text
                assert not any(one.verified for one in said[at:])
                del said[at:]
                assert token.verified
            said.append(token)
        assert ids(said) == text == one.stats.tokens
        assert "".join(token.text for token in said) == one.stats.text
        assert one.stats.replaced > 0 and one.stats.unverified == 0
        assert one.tokens[11:] == text


@pytest.mark.parametrize("how", ["keep", lambda rollback: False])
def test_wrong_guesses_stand_where_the_caller_keeps_them(how: Any) -> None:
    wire = wired()
    with device(wire, "stream", on_rollback=how) as one:
        lie(one)
        tokens = one.generate(PROMPT, max_tokens=250)
        said = cut_after(wire, tokens, 5, 0.5) + list(tokens)
        assert ids(said) == one.stats.tokens == one.tokens[11:]
        assert one.stats.unverified > 0 and one.stats.replaced == 0
        assert ids(said) != local(max_tokens=250)
        # What follows is what the cloud says after the text that stands.
        last = said[-1]
        assert last.verified
        with device(mode="local") as alone:
            assert ids(alone.generate(one.tokens[:-1], max_tokens=1)) == [last.id]


@pytest.mark.parametrize(("how", "stands"), [("replace", False), ("keep", True), (lambda rollback: False, False)])
def test_guesses_count_only_where_they_are_to_when_their_reader_leaves(how: Any, stands: bool, tmp_path: Path) -> None:
    path, wire = tmp_path / "talk", wired()
    with device(wire, "stream", on_rollback=how, resume=path) as one:
        lie(one)
        tokens: Any = one.generate(PROMPT, max_tokens=60)
        said = cut_after(wire, tokens, 5, 1e9) + [next(tokens) for _ in range(20)]
        guesses = [token.id for token in said if not token.verified]
        sure = [token.id for token in said if token.verified]
        assert guesses
        tokens.close()
        assert one.stats.finish == "cancelled"
        assert one.stats.tokens == one.tokens[11:] == sure + (guesses if stands else [])
        assert one.stats.unverified == (len(guesses) if stands else 0)
        assert one.stats.text == "".join(token.text for token in said if token.verified or stands)
    with device(LossyWire(ToyService()), "stream", resume=path) as two:
        rest = ids(two.go_on())
        assert (sure + rest == local(max_tokens=60)) is not stands


def test_a_link_that_stays_dark_leaves_guesses_and_says_so() -> None:
    wire = wired()
    with device(wire, "stream") as one:
        tokens = one.generate(PROMPT, max_tokens=30)
        head = cut_after(wire, tokens, 5, 1e9)
        rest = list(tokens)
        assert ids(head + rest) == local(max_tokens=30)
        guesses = [token for token in rest if not token.verified]
        assert one.stats.unverified == len(guesses) > 20
        assert "went on by itself" in one.stats.note
        # Back again, the conversation goes on where it stands.
        wire.dark.clear()
        more = ids(one.generate(max_tokens=10))
        assert ids(head + rest) + more == local(max_tokens=40)
        assert one.stats.unverified == 0


def test_a_device_that_cannot_go_on_waits() -> None:
    wire = wired()
    with device(wire, "stream", ToyBundle(held=3)) as one:
        tokens = one.generate(PROMPT, max_tokens=30)
        head = cut_after(wire, tokens, 5, 2.0)
        assert ids(head) + ids(tokens) == local(max_tokens=30)
        assert one.stats.unverified == one.stats.replaced == 0


def test_no_fallback_waits_too() -> None:
    wire = wired()
    with device(wire, "stream", fallback=False) as one:
        tokens = one.generate(PROMPT, max_tokens=30)
        head = cut_after(wire, tokens, 5, 2.0)
        assert all(token.verified for token in head + list(tokens))


def test_a_slow_cloud_is_no_silent_one() -> None:
    """Signs of life count, even where the answer takes longer than two round trips."""

    class Slow(ToyService):
        def receive(self, message: Any) -> list[tuple[float, Any]]:
            late = 0.0 if isinstance(message, m.Ping | m.Hello) else 0.6
            return [(late + delay, answer) for delay, answer in super().receive(message)]

    wire = LossyWire(Slow(), delay_s=(RTT_S / 2, RTT_S / 2))
    with device(wire, "stream") as one:
        assert all(token.verified for token in one.generate(PROMPT, max_tokens=10))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["stream", "verify", "split", "auto"]),
    wrong=st.booleans(),
    keep=st.booleans(),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), max_size=4),
    reconnect=st.sampled_from([7, 1 << 60]),
    restart=st.sampled_from([5, 23, 1 << 60]),
)
def test_whenever_the_link_is_cut_the_text_is_the_same(
    seed: int, mode: str, wrong: bool, keep: bool, cuts: list[tuple[float, float]], reconnect: int, restart: int
) -> None:
    wire = wired(seed=seed)
    wire.reconnect_every, wire.restart_after = reconnect, restart
    wire.dark = [(100.0 + start, 100.0 + start + length) for start, length in cuts]
    with device(wire, mode, on_rollback="keep" if keep else "replace") as one:
        if wrong:
            lie(one)
        told = list(one.generate(PROMPT, max_tokens=50))
        assert len(told) == len(one.stats.tokens) + one.stats.replaced
        assert one.tokens[11:] == one.stats.tokens
        if not (wrong and (keep or one.stats.unverified)):
            assert one.stats.tokens == local(max_tokens=50)


def test_how_to_roll_back_is_checked() -> None:
    with pytest.raises(DeviceError, match="on_rollback is 'undo'"):
        device(mode="local", on_rollback="undo")


def test_a_bridge_begins_again_where_the_log_went_another_way() -> None:
    log = Chain([1, 2, 3])
    bridge = Bridge(lambda told, sampling: len(told), "device", log, Sampling())
    assert [bridge.say(), bridge.say()] == [3, 4]
    log.extend([3])
    assert bridge.say() == 5
    log.extend([9])
    assert bridge.say() == 5


def test_what_was_said_is_told_again_as_long_as_it_stands() -> None:
    drafts = Retold([1, 2, 3, 4, 5])
    drafts.extend([1, 2])
    assert drafts.draft(2) == [3, 4] and drafts.draft(9) == [3, 4, 5]
    drafts.extend([3, 7])
    assert drafts.draft(2) == []
    drafts.truncate(3)
    assert (len(drafts), drafts.draft(1)) == (3, [4])


def busy_for(one: Any, wire: LossyWire, ready_s: float) -> None:
    """Has a device work while it waits, and be ready after so many seconds of silence."""
    silent_s = [0.0]

    def work(sampling: Sampling, begins: bool, anew: bool, left_s: float) -> float:
        wire.now += 0.01
        silent_s[0] = silent_s[0] + 0.01 if left_s <= 0.0 else 0.0
        return 0.0 if silent_s[0] <= ready_s else math.inf

    one._steering._standby.work = work


@pytest.mark.parametrize("mode", ["stream", "verify", "split"])
@pytest.mark.parametrize("slides", [False, True])
def test_a_device_makes_itself_ready_while_it_waits(mode: str, slides: bool) -> None:
    wire, slices = wired(), list[float]()
    options: dict[str, Any] = {"kv_tokens": 512, "overflow": "slide"} if slides else {}

    def work(sampling: Sampling, begins: bool, anew: bool, left_s: float) -> float:
        slices.append(left_s)
        return math.inf

    with device(wire, mode, **options) as one:
        standby: Any = one._steering._standby
        standby.work = work
        list(one.generate(PROMPT, max_tokens=6))
    assert bool(slices) == (not slides or mode != "split")


@pytest.mark.parametrize("mode", ["stream", "verify"])
def test_a_device_with_an_exit_makes_that_ready_while_it_waits(mode: str) -> None:
    wire, bundle = wired(), ToyBundle(held=4)
    bundle.exits = (SimpleNamespace(layer=CUT, file=""),)
    with device(wire, mode, bundle, standby=True) as one:
        give_exit(one)
        tokens = one.generate(PROMPT, max_tokens=60)
        head = [next(tokens) for _ in range(30)]
        speaker = one._exits.speaker(CUT)
        assert speaker.held(one._log) >= len(one._log) - MOST
        wire.dark.append((wire.now, wire.now + 0.5))
        assert ids(head + list(tokens))[:30] == local(max_tokens=30)
        assert one.stats.tokens == local(max_tokens=60) and one.stats.unverified == 0


def test_a_device_that_makes_itself_ready_still_hears_that_the_link_is_dark() -> None:
    wire = wired()
    with device(wire, "stream") as one:
        busy_for(one, wire, 0.0)
        tokens = one.generate(PROMPT, max_tokens=40)
        cut_after(wire, tokens, 5, 1e9)
        dark = wire.now
        while next(tokens).verified:
            dark = wire.now
        assert wire.now - dark <= max(0.05, 2 * RTT_S) + RTT_S


def test_a_device_that_is_not_ready_hears_the_cloud_again_and_need_not_guess() -> None:
    for dark_s, ready_s, guesses in ((0.5, 5.0, False), (0.5, 0.1, True)):
        wire = wired()
        with device(wire, "stream") as one:
            busy_for(one, wire, ready_s)
            tokens = one.generate(PROMPT, max_tokens=40)
            cut_after(wire, tokens, 5, dark_s)
            rest = list(tokens)
            assert any(not token.verified for token in rest) == guesses
            assert one.stats.tokens == local(max_tokens=40)


def test_a_device_that_is_asked_while_it_rolls_back_says_that_it_is_busy() -> None:
    wire, asked = wired(), list[Any]()
    with device(wire, "stream", on_rollback=lambda wrong: asked[0].reset()) as one:
        asked.append(one)
        lie(one)
        tokens = one.generate(PROMPT, max_tokens=250)
        cut_after(wire, tokens, 5, 0.5)
        with pytest.raises(DeviceError, match="in the middle of an answer"):
            list(tokens)
        assert "silent" not in one.stats.note


@pytest.mark.parametrize("exit_", [True, False])
def test_auto_begins_an_answer_though_the_link_has_been_dark_for_long(exit_: bool) -> None:
    """A device that holds a part of the model: with an exit it goes on, else it says why it cannot."""
    wire, soon = wired(), Timeouts(connect_ms=2000, give_up_ms=400, retry_ms=100)
    with device(wire, "auto", ToyBundle(held=3), timeouts=soon) as one:
        if exit_:
            give_exit(one)
        assert all(token.verified for token in one.generate(PROMPT, max_tokens=20))
        wire.dark.append((wire.now, wire.now + 60.0))
        if not exit_:
            for _ in range(2):
                with pytest.raises(LinkError):
                    list(one.generate(None, max_tokens=20))
            return
        for _ in range(3):
            went = list(one.generate(None, max_tokens=60))
            assert len(went) == 60 and went[-1].source == "exit" and not went[-1].verified
            assert one.stats.unverified > 0
            wire.now += 3.0  # the link knows that it is down
        wire.dark.clear()
        assert list(one.generate(None, max_tokens=60))[-1].verified


@pytest.mark.parametrize("whole", [True, False])
def test_a_complete_answer_waits_longer_for_its_cloud_where_less_than_the_whole_model_guessed(
    whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A stall of six seconds hides the end of an answer, then the link is lost for good."""
    wire = wired()
    with device(wire, "stream", ToyBundle(held=N_LAYERS if whole else 4), timeouts=Timeouts()) as one:
        give_exit(one)
        tokens = one.generate(PROMPT, max_tokens=40)
        said = cut_after(wire, tokens, 5, 6.0) + list(tokens)
        assert any(not token.verified for token in said)
        assert (one.stats.unverified > 0) == whole
        assert caplog.text.count("tokens wait for the cloud to confirm them") == (0 if whole else 1)
        assert one.stats.tokens == local(max_tokens=40)
        wire.now += 10.0
        wire.dark.append((wire.now, math.inf))
        for least_s, most_s in ((0.0, 3.0) if whole else (12.0, 14.0), (0.0, 3.0), (0.0, 3.0)):
            began = wire.now  # each answer after the first gives it a moment
            assert len(list(one.generate(None, max_tokens=20))) == 20
            assert one.stats.unverified == 20
            assert least_s <= wire.now - began < most_s


def test_what_an_exit_said_waits_where_the_whole_model_is_here_as_well() -> None:
    """In exit mode, where a stall hides so little of an answer that only the exit's first words are guessed."""
    wire = wired()
    with exiting(wire, 0.9, timeouts=Timeouts()) as one:
        tokens = one.generate(PROMPT, max_tokens=40)
        said = [next(tokens) for _ in range(36)]
        wire.dark.append((wire.now, wire.now + 4.0))
        said += tokens
        assert {token.source for token in said if not token.verified} == {"exit"}
        assert one.stats.unverified == 0


def test_how_long_a_complete_answer_waits_is_what_one_says() -> None:
    for whole in (True, False):
        assert Timeouts(confirm_ms=2500).confirm_s(whole) == 2.5
        assert Timeouts(give_up_ms=7_000).confirm_s(whole) == (1.0 if whole else 7.0)


@pytest.mark.parametrize("whole", [True, False])
def test_in_exit_mode_the_exit_begins_and_the_whole_model_goes_on_where_it_is_here(whole: bool) -> None:
    wire = wired()
    with exiting(wire, 1.0, bundle=ToyBundle() if whole else ToyBundle(held=4)) as one:
        tokens = one.generate(PROMPT, max_tokens=60)
        head = cut_after(wire, tokens, 5, 1e9)
        after = list(tokens)
        sure = next(at for at, token in enumerate(after) if not token.verified)
        guesses = after[sure:]
        sources = [token.source for token in guesses]
        assert sources == ["exit"] * SOON + ["device" if whole else "exit"] * (len(guesses) - SOON)
        assert len(guesses) > 2 * SOON
        if whole:  # it says what it would have said after those first words
            said = [*PROMPT.encode(), *ids(head + after[: sure + SOON])]
            rest = ids(guesses[SOON:])
            assert rest == local(said, max_tokens=len(rest))


@pytest.mark.parametrize("later", [True, False])
def test_guesses_that_nobody_confirmed_are_not_what_a_file_keeps(tmp_path: Path, later: bool) -> None:
    path, wire = tmp_path / "talk", wired()
    with device(wire, "stream", resume=path) as one:
        lie(one)
        tokens = one.generate(PROMPT, max_tokens=30)
        head = cut_after(wire, tokens, 5, 1e9)
        said = ids(head + list(tokens))
        sure = len(said) - one.stats.unverified
        assert one.stats.unverified > 20 and said != local(max_tokens=30)
        if later:  # the conversation goes on with them
            list(one.generate(list(b" and "), max_tokens=3))
        log = one.tokens
    with device(wired(), "stream", resume=path) as two:
        if later:
            assert two.tokens[: len(log) - 3] == log[: len(log) - 3]
            return
        assert two.unfinished is not None and two.tokens == [*PROMPT.encode(), *said[:sure]]
        assert said[:sure] + ids(two.go_on()) == local(max_tokens=30)
    with device(wired(), "stream", resume=path) as three:
        assert three.unfinished is None and three.tokens == [*PROMPT.encode(), *local(max_tokens=30)]
