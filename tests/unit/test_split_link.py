"""Links as plans take them: from words, traces and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.protocol.errors import PlanError
from isthmus.split.link import read_link
from isthmus.split.traces import TraceError, mean_rate, synthetic_pair, write


def test_words_say_a_round_trip_and_rates() -> None:
    one = read_link("rtt=20, up=5,down=20.5")
    assert (one.trip_ms, one.up, one.down, one.changes) == (20.0, 5e6, 20.5e6, False)
    both = read_link("rate=8,rtt=0")
    assert (both.up, both.down) == (8e6, 8e6)
    assert one.words == "a round trip of 20 ms, 5 Mbit/s up and 20.5 down"


def test_a_trace_is_searched_with_its_mean(tmp_path: Path) -> None:
    up, down = synthetic_pair()
    for way, trace in (("up", up), ("down", down)):
        write(trace, tmp_path / f"link.{way}")
    for text in ("rtt=50,trace=synthetic", f"rtt=50,trace={tmp_path / 'link'}"):
        one = read_link(text)
        assert one.changes and one.rate().up_bps == mean_rate(up) and one.rate().down_bps == mean_rate(down)
        assert one.words.endswith("in the mean of a trace")


def test_a_measured_link_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "link.json"
    path.write_text('{"format": "isthmus-link", "rtt_ms": 12.5, "up_mbps": 4, "down_mbps": 30}')
    one = read_link(str(path))
    assert (one.trip_ms, one.up, one.down) == (12.5, 4e6, 30e6)
    for text in ('{"format": "isthmus-plan", "rtt_ms": 1, "up_mbps": 4, "down_mbps": 30}', "{}", "hello"):
        path.write_text(text)
        with pytest.raises(PlanError, match="no link"):
            read_link(str(path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "says nothing of a link"),
        ("20ms", "says nothing of a link"),
        ("rtt=20,loss=3", "says nothing of a link"),
        ("rtt=20,rtt=30,rate=1", "says nothing of a link"),
        ("rtt=20", "lacks a round trip or a rate, or has two"),
        ("up=1,down=2", "lacks a round trip"),
        ("rtt=20,up=1", "lacks a round trip or a rate"),
        ("rtt=20,up=1,down=1,rate=2", "or has two"),
        ("rtt=x,rate=1", "rtt is 'x'"),
        ("rtt=nan,rate=1", "rtt is 'nan'"),
        ("rtt=1,rate=inf", "rate is 'inf'"),
        ("rtt=-1,rate=1", "round trip is -1 ms"),
        ("rtt=1,rate=0", "0 bit/s up, so nothing arrives"),
        ("rtt=1,up=1,down=0", "0 bit/s down, so nothing arrives"),
    ],
)
def test_what_is_no_link_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem) as failed:
        read_link(text)
    assert failed.value.remedy and "\n" not in str(failed.value)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent\.up cannot be read"):
        read_link(f"rtt=1,trace={tmp_path / 'absent'}")
