"""What is asked of a link in the middle of an answer leaves the answer alone."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.edge.events import Refused, Streamed, Up
from isthmus.protocol import messages as m
from isthmus.protocol.errors import LinkError
from tests.edge_exits import exiting
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyService


@pytest.mark.parametrize("breaks", [False, True])
def test_a_welcome_in_the_middle_of_a_stream_loses_nothing(breaks: bool) -> None:
    wire = LossyWire(ToyService(token_s=0.02))
    with device(wire, "stream", fallback=False) as one:
        tokens = one.generate(PROMPT, max_tokens=20)
        told = [next(tokens).id for _ in range(5)]
        assert one._link is not None
        wire.now += 0.1
        if breaks:
            wire.reconnect()
        one._link.look()
        assert one._link.session.events
        assert one._link.welcome() == one._link.session.welcome
        assert told + ids(tokens) == local(max_tokens=20)


@pytest.mark.parametrize("mode", ["stream", "split", "verify", "exit"])
@pytest.mark.parametrize("seed", range(5))
def test_a_welcome_before_each_token_loses_nothing(mode: str, seed: int) -> None:
    wire = LossyWire(ToyService(token_s=0.02), seed, drop=0.1, repeat=0.1, delay_s=(0.001, 0.1))
    wire.reconnect_every = 7 if mode != "stream" else 3
    one: Any = exiting(wire, 1.0, fallback=False) if mode == "exit" else device(wire, mode, fallback=False)
    with one:
        told = []
        for token in one.generate(PROMPT, max_tokens=20):
            told.append(token.id)
            wire.now += 0.05
            one._link.look()
            one._link.welcome()
        assert told == local(max_tokens=20)
        assert ids(one.generate("hello", max_tokens=9)) == local("hello", max_tokens=9)


def test_a_welcome_takes_what_says_that_it_is_none_and_nothing_else() -> None:
    with device(LossyWire(ToyService()), "stream") as one:
        ids(one.generate(PROMPT, max_tokens=2))
        link = one._link
        assert link is not None
        news = [Streamed(link.session.lane(1, 0), [token], False, "") for token in (5, 6)]
        link.session.events.extend([news[0], Up(), Refused(LinkError("it is full")), Up(), news[1]])
        with pytest.raises(LinkError, match="it is full"):
            link.welcome()
        assert list(link.session.events) == news
        assert link.welcome() is not None
        link.session.events.clear()


@pytest.mark.parametrize("mode", ["stream", "split", "verify", "exit"])
def test_what_came_and_was_not_read_is_gone_with_the_question(mode: str) -> None:
    wire = LossyWire(ToyService(token_s=0.02))
    one: Any = exiting(wire, 1.0) if mode == "exit" else device(wire, mode)
    with one:
        for following in ("stream", "split", "verify", "exit") if mode == "exit" else ("stream", "split", "verify"):
            tokens = one.generate(PROMPT, max_tokens=20, mode=mode)
            for _ in range(3):
                next(tokens)
            wire.now += 0.1
            one._link.look()
            tokens.close()
            assert not one._link.session.events
            assert ids(one.generate(PROMPT, max_tokens=20, mode=following)) == local(max_tokens=20)


@pytest.mark.parametrize(("computed_s", "ago_s"), [(0.04, 0.02), (3.0, 0.05)])
def test_what_was_here_already_came_since_the_device_last_looked(computed_s: float, ago_s: float) -> None:
    wire, news, came = LossyWire(ToyService()), list[Any](), list[float]()
    with device(wire, "stream") as one:
        ids(one.generate(PROMPT, max_tokens=2))
        link: Any = one._link
        link.session.receive = lambda message, now: came.append(now)
        wire.receive = lambda timeout_ms: news.pop() if news else None  # type: ignore[method-assign]
        link.look()
        wire.now += computed_s
        news.append(m.Pong(0))
        link.look()
        assert came == [pytest.approx(wire.now - ago_s)]
