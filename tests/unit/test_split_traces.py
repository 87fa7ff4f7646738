"""Traces of a changing link: read, written, and made up."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from isthmus.split.traces import (
    Trace,
    TraceError,
    mean_rate,
    named_pair,
    read,
    read_pair,
    synthetic,
    synthetic_pair,
    turned,
    write,
)


def test_a_trace_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "link.up").write_bytes(b"0\n3\r\n3\n 10\n")
    (tmp_path / "link.down").write_bytes(b"5")
    up, down = read_pair(tmp_path / "link")
    assert (up.times_ms, up.period_ms, down.times_ms) == ((0, 3, 3, 10), 10, (5,))
    assert mean_rate(up) == 4 * 12_000 / 0.010
    write(up, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"0\n3\n3\n10\n"
    assert read(tmp_path / "again").times_ms == up.times_ms


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1\n2\nx\n", "line 3: 'x' is no time in ms"),
        (b"1\n\n2\n", "line 2: ''"),
        (b"1\n-2\n", "line 2: '-2'"),
        (b"1\n2.5\n", "line 2: '2.5'"),
        (b"1\n\xff\xfe\n", "line 2:"),
        (b"1\n" + b"9" * 5000, "line 2:"),
        (b"4\n3\n", "line 2: 3 is earlier than 4"),
        (b"0\n0\n", "ends at 0 ms"),
        (b"", "has no lines"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.up"
    path.write_bytes(content)
    with pytest.raises(TraceError) as failed:
        read(path)
    assert said in failed.value.problem and str(path) in failed.value.problem and failed.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.up cannot be read: No such file"):
        read_pair(tmp_path / "none")
    with pytest.raises(TraceError, match="cannot be written"):
        write(Trace((1,)), tmp_path / "no" / "folder")
    with pytest.raises(TraceError, match="line 1: -1 is negative"):
        Trace((-1, 2))


def test_a_synthetic_trace_is_the_same_everywhere(tmp_path: Path) -> None:
    trace = synthetic(7, 60, 4_000_000)
    write(trace, tmp_path / "trace")
    digest = hashlib.sha256((tmp_path / "trace").read_bytes()).hexdigest()
    assert digest == "8e04e49def81d70b046b0e613aaa55eab0e66c23954bc0800cac1407d93a9243"
    assert synthetic(8, 60, 4_000_000).times_ms != trace.times_ms
    assert synthetic(-1, 1, 12_000).times_ms == (1000,)


@pytest.mark.parametrize(("seconds", "mean_bps"), [(1, 12_000), (10, 100_000), (60, 4_000_000), (120, 50_000_000)])
def test_a_synthetic_trace_has_its_length_and_mean(seconds: int, mean_bps: int) -> None:
    trace = synthetic(1, seconds, mean_bps)
    assert trace.period_ms == seconds * 1000
    assert 0 <= mean_bps - mean_rate(trace) < 12_000 / seconds


def test_a_synthetic_link_comes_and_goes() -> None:
    def by_second(trace: Trace) -> list[int]:
        counts = [0] * 300
        for time_ms in trace.times_ms:
            counts[(time_ms - 1) // 1000] += 1
        return counts

    mean = 5_000_000 / 12_000
    often = by_second(synthetic(3, 300, 5_000_000, outage_every_s=10, outage_s=3))
    assert sum(count < mean / 20 for count in often) > 20
    assert max(often) > 1.5 * mean
    assert min(by_second(synthetic(3, 300, 5_000_000, outage_every_s=0))) > mean / 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"seconds": 0, "mean_bps": 10**6},
        {"seconds": -1, "mean_bps": -(10**6)},
        {"seconds": 1, "mean_bps": 11_999},
        {"seconds": 10, "mean_bps": 10**12},
        {"seconds": 10, "mean_bps": 10**6, "outage_every_s": 1, "outage_s": 1},
        {"seconds": 10, "mean_bps": 10**6, "outage_s": 0.05},
    ],
)
def test_a_synthetic_trace_out_of_bounds(arguments: dict[str, Any]) -> None:
    with pytest.raises(TraceError):
        synthetic(0, **arguments)


def test_a_synthetic_link_needs_no_file() -> None:
    assert named_pair("synthetic") == synthetic_pair() != named_pair("synthetic:7") == synthetic_pair(7)
    for name in ("synthetic:", "synthetic:-1", "synthetic:x"):
        with pytest.raises(TraceError, match="seed"):
            named_pair(name)


def test_a_trace_from_a_later_moment_on() -> None:
    trace = Trace((100, 400, 1000))
    assert turned(trace, 0.4).times_ms == (600, 700, 1000)
    assert turned(trace, 0.0).times_ms == turned(trace, 3.0).times_ms == trace.times_ms
    assert turned(turned(trace, 0.4), 0.6) == trace
    assert turned(trace, 0.3).times_ms == (100, 700, 800)  # repeats from the opportunity before, which is sooner
