"""Answers that are replayed: by hand where the link is steady, slower where it stalls or the cloud is busy."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.apps.cli.decoder_replay import ANSWERS, Rounds, replayed
from isthmus.split.link import Link
from isthmus.split.traces import Trace

STEADY = Link(20.0, 8e6, 8e6)  # a byte each microsecond


def test_a_device_alone_takes_its_steps() -> None:
    taken = replayed(Rounds(device_ms=5.0, prompt_ms=30.0), STEADY, 10)
    assert taken.first == pytest.approx(np.full(ANSWERS, 35.0)) and taken.total == pytest.approx(np.full(ANSWERS, 80.0))
    assert taken.token == pytest.approx(np.full(ANSWERS, 5.0))
    assert replayed(Rounds(device_ms=5.0, prompt_ms=30.0), STEADY, 1).token == pytest.approx(np.full(ANSWERS, 5.0))


def test_a_question_takes_its_trip_and_the_cloud() -> None:
    way = Rounds(1.0, 5.0, 1.0, 0.0, 2000.0, 1000.0, 7.0)
    taken = replayed(way, STEADY, 4)
    assert taken.total == pytest.approx(np.full(ANSWERS, 4 * (5.0 + 2.0 + 20.0 + 7.0 + 1.0)))
    assert way.device_total_ms(4) == 20.0 and way.cloud_total_ms(4) == 28.0


def test_a_round_of_several_tokens_may_be_wanted_in_part() -> None:
    way = Rounds(3.0, 4.0, 1.0, 0.0, 0.0, 0.0, 6.0)
    whole, part = replayed(way, STEADY, 6), replayed(way, STEADY, 4)
    assert whole.total == pytest.approx(np.full(ANSWERS, 60.0)) and part.total == pytest.approx(np.full(ANSWERS, 40.0))
    one = replayed(way, STEADY, 1)
    assert one.first == pytest.approx(one.total) and one.total == pytest.approx(np.full(ANSWERS, 30.0))
    for tokens, each in ((3, 10.0), (4, 10.0), (6, 10.0), (2, 15.0), (1, 30.0)):  # a round is never half made
        assert replayed(way, STEADY, tokens).token == pytest.approx(np.full(ANSWERS, each)), tokens


def test_a_stream_waits_for_one_trip() -> None:
    way = Rounds(asks=1.0, down_bytes=1000.0, cloud_ms=7.0, streamed=True, prompt_bytes=3000.0, cloud_prompt_ms=50.0)
    taken = replayed(way, STEADY, 5)
    first = 3.0 + 10.0 + 50.0 + 7.0 + 1.0 + 10.0
    assert taken.first == pytest.approx(np.full(ANSWERS, first))
    assert taken.total == pytest.approx(np.full(ANSWERS, first + 4 * 7.0))
    assert taken.token == pytest.approx(np.full(ANSWERS, (5 * 7.0 + 1.0) / 5))


def test_the_cloud_answers_when_it_has_the_prompt() -> None:
    way = Rounds(1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0, prompt_bytes=100_000.0, prompt_ms=5.0, cloud_prompt_ms=40.0)
    assert replayed(way, STEADY, 1).total == pytest.approx(np.full(ANSWERS, 100.0 + 10.0 + 40.0 + 2.0 + 10.0))


def test_who_asks_for_a_share_of_rounds_waits_for_that_share() -> None:
    way = Rounds(1.0, 5.0, 0.3, 0.0, 0.0, 0.0, 10.0)
    taken = replayed(way, STEADY, 200)
    assert taken.total.mean() == pytest.approx(200 * (5.0 + 0.3 * 30.0), rel=0.01) and taken.total.std() > 0


def test_others_in_the_cloud_are_waited_for() -> None:
    for cloud_ms in (10.0, 1.0):  # how long one's own takes does not matter
        way = Rounds(1.0, 5.0, 1.0, 0.0, 0.0, 0.0, cloud_ms)
        alone, busy = replayed(way, STEADY, 50), replayed(way, STEADY, 50, 0.5, 10.0)
        assert (busy.total - alone.total).mean() == pytest.approx(51 * 5.0, rel=0.1)  # M/D/1: half a service time


def test_a_question_waits_for_what_was_sent_before_it() -> None:
    asks_all = Rounds(1.0, 5.0, 1.0, 10_000.0, 0.0, 0.0, 3.0)  # ten ms up for each five on the device
    assert replayed(asks_all, STEADY, 4).total == pytest.approx(np.full(ANSWERS, 4 * (5.0 + 10.0 + 20.0 + 3.0)))
    rarely = replayed(Rounds(1.0, 5.0, 0.1, 10_000.0, 0.0, 0.0, 3.0), STEADY, 400)
    waits = 400 * 0.1 * (20.0 + 3.0)
    assert rarely.total.mean() > 400 * 10.0 + waits * 0.5  # the uplink is the narrow place, not the device


def test_a_link_that_stalls_makes_some_answers_late() -> None:
    stalls = Trace((*range(1, 8_001), 10_000))  # two seconds of silence in ten
    link, way = Link(20.0, stalls, stalls), Rounds(1.0, 5.0, 1.0, 0.0, 100.0, 100.0, 5.0)
    taken = replayed(way, link, 20)
    calm = 20 * 31.0
    assert np.percentile(taken.total, 50) == pytest.approx(calm, rel=0.1) and taken.total.max() > calm + 1500.0
    assert taken.total == pytest.approx(replayed(way, link, 20).total)
