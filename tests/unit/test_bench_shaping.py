"""Links without sockets: when each byte is due, with rates, traces, jitter, stalls and cuts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.bench.shaping import MS, BenchError, LinkProfile, Opportunities, Pipe
from isthmus.split.traces import Trace, write


@pytest.mark.parametrize(
    "arguments",
    [
        {"delay_up_ms": -1},
        {"delay_down_ms": float("nan")},
        {"jitter_ms": 1e9},
        {"rate_up_bps": 0},
        {"rate_down_bps": float("inf")},
        {"rate_up_bps": 10**6, "trace_up": Trace((1,))},
        {"queue_bytes": 1499},
    ],
)
def test_a_profile_checks_itself(arguments: dict[str, Any]) -> None:
    with pytest.raises(BenchError) as failed:
        LinkProfile(**arguments)
    assert next(iter(arguments)) in failed.value.problem and failed.value.remedy


def test_profiles_are_made_and_described(tmp_path: Path) -> None:
    assert LinkProfile.of_rtt(50, jitter_ms=2) == LinkProfile(delay_up_ms=25, delay_down_ms=25, jitter_ms=2)
    assert LinkProfile(delay_up_ms=10, delay_down_ms=30).rtt_ms == 40
    for way in ("up", "down"):
        write(Trace((1, 2)), tmp_path / f"link.{way}")
    profile = LinkProfile.of_traces(tmp_path / "link", rtt_ms=8)
    told = profile.describe()
    assert told["mean_up_bps"] == 12_000_000 and told["delay_up_ms"] == 4
    assert str(told["trace_down"]).endswith("link.down") and json.dumps(told)


def test_a_link_of_a_synthetic_trace_says_so() -> None:
    told = LinkProfile.of_traces("synthetic:7", rtt_ms=8).describe()
    assert told["trace_up"] == "synthetic(seed=7, seconds=120, mean_bps=1200000)" and json.dumps(told)


def test_opportunities_repeat_and_pass() -> None:
    places = Opportunities(Trace((0, 3, 3, 10)), 5 * MS)
    met = []
    for _ in range(9):
        met.append(places.time_ns // MS - 5)
        places.left = 0
        places.reach(0)
    assert met == [0, 3, 3, 10, 10, 13, 13, 20, 20]
    for ready_ms, next_ms in [(25, 30), (30, 30), (30.5, 33), (1_000_000, 1_000_000), (1_000_003.5, 1_000_010)]:
        places.seek(round((5 + ready_ms) * MS))
        assert places.time_ns // MS - 5 == next_ms


def pipe(delay_ms: float = 0.0, **options: Any) -> Pipe[str]:
    return Pipe(delay_ms, **options)


def push(link: Pipe[str], now_ms: float, size: int, to: str = "a") -> None:
    link.push(round(now_ms * MS), memoryview(bytes(size)), to)


def drain(link: Pipe[str], until_ms: float = 1e6) -> list[tuple[float, str, int]]:
    """(time in ms, to, bytes) of all that comes out, by a clock that goes from one due time to the next."""
    out = []
    while (due := link.next_ns()) is not None and due <= until_ms * MS:
        came = link.pop(due)
        assert came, "woken for nothing"
        out += [(due / MS, to, len(data)) for data, to in came]
    return out


def ends(out: list[tuple[float, str, int]]) -> dict[str, float]:
    return {to: round(time_ms, 6) for time_ms, to, _ in out}


def test_a_delay_is_exact() -> None:
    link = pipe(25)
    push(link, 0, 100, "a")
    push(link, 10, 10**6, "b")
    assert link.pop(25 * MS - 1) == [] and link.queued == 0
    assert drain(link) == [(25, "a", 100), (35, "b", 10**6)]
    assert (link.bytes, link.packets) == (10**6 + 100, 1 + 667)
    assert link.next_ns() is None


def test_a_rate_is_shared_and_keeps_its_pace() -> None:
    link = pipe(5, rate_bps=1_000_000)  # 125 bytes a ms
    push(link, 0, 12_500, "a")
    push(link, 1, 125, "b")
    push(link, 500, 125, "c")
    out = drain(link)
    assert ends(out) == {"a": 105, "b": 106, "c": 506}
    assert [size for _, to, size in out if to == "a"] == [1500] * 8 + [500]
    assert link.packets == 9 + 1 + 1


def test_waking_late_costs_no_rate() -> None:
    link = pipe(rate_bps=1_000_000)
    push(link, 0, 12_500)
    assert sum(len(data) for data, _ in link.pop(70 * MS)) == 7500
    assert drain(link)[-1][0] == 100


def test_a_fast_rate_comes_in_larger_pieces() -> None:
    link = pipe(rate_bps=1_000_000_000)
    push(link, 0, 1_250_000)
    out = drain(link)
    assert len(out) < 50 and round(out[-1][0], 3) == 10 and link.packets == 834


def test_jitter_is_bounded_and_nothing_overtakes() -> None:
    def run(seed: int) -> list[tuple[float, str, int]]:
        link = pipe(10, jitter_ms=5, seed=seed)
        for i in range(200):
            push(link, i, 100, str(i))
        return drain(link)

    out = run(1)
    assert [to for _, to, _ in out] == [str(i) for i in range(200)]
    late = [time_ms - int(to) - 10 for time_ms, to, _ in out]
    assert min(late) >= 0 and max(late) <= 5 and len({round(x, 6) for x in late}) > 100
    assert run(1) == out != run(2)


def test_a_trace_delivers_and_what_nobody_uses_is_lost() -> None:
    link = pipe(trace=Trace((10, 20, 20, 100)))
    push(link, 0, 4000, "a")
    push(link, 21, 10, "b")
    assert drain(link) == [(10, "a", 1500), (20, "a", 1500), (20, "a", 1000), (100, "b", 10)]
    push(link, 115, 1500, "c")
    push(link, 119, 1501, "d")
    assert drain(link) == [(120, "c", 1500), (120, "d", 1500), (200, "d", 1)]
    assert link.packets == 3 + 1 + 1 + 2


def test_small_chunks_share_an_opportunity() -> None:
    link = pipe(trace=Trace((10, 30)))
    for to, size in (("a", 700), ("b", 700), ("c", 200)):
        push(link, 1, size, to)
    assert drain(link, 10) == [(10, "a", 700), (10, "b", 700), (10, "c", 100)]
    push(link, 11, 50, "d")  # after the opportunity, which has nothing left for it
    assert drain(link) == [(30, "c", 100), (30, "d", 50)]
    assert link.packets == 4


def test_an_opportunity_is_met_by_what_arrives_with_the_delay() -> None:
    link = pipe(25, trace=Trace((10, 30, 50)))
    push(link, 5, 10, "at 30")
    push(link, 5.5, 10, "after 30")
    assert ends(drain(link)) == {"at 30": 30, "after 30": 50}


def test_the_queue_counts_what_waits_but_not_what_is_under_way() -> None:
    link = pipe(100, rate_bps=1_000_000, queue_bytes=10_000)
    push(link, 0, 7500)
    assert (link.queued, link.room) == (7500, 2500)
    assert link.next_ns(4000) == 12 * MS and link.next_ns() == 112 * MS
    assert link.next_ns(10_000) == 60 * MS
    link.serve(12 * MS)
    assert (link.queued, link.room) == (6000, 4000)
    push(link, 12, 9000)
    assert link.room == 0
    link.serve(132 * MS)
    assert link.queued == 0 and link.next_ns(10_000) == 112 * MS
    assert drain(link)[-1][0] == 232


def test_room_in_a_trace_is_foreseen() -> None:
    link = pipe(1, trace=Trace((10, 20, 30)), queue_bytes=6000)
    push(link, 0, 6000)
    for room, at_ms in ((1, 9), (1500, 9), (1501, 19), (4500, 29), (4501, 39), (6000, 39)):
        assert link.next_ns(room) == min(at_ms, 40) * MS
        twin = pipe(1, trace=Trace((10, 20, 30)), queue_bytes=6000)
        push(twin, 0, 6000)
        twin.serve(at_ms * MS)
        assert twin.room >= room


@pytest.mark.parametrize("options", [{"rate_bps": 300_000}, {"trace": Trace((3, 9, 9, 40))}, {}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_when_it_is_asked_changes_nothing(options: dict[str, Any], seed: int) -> None:
    """What leaves ahead of the delay, and wakes that come late or for nothing, do not move what is due."""
    draw = random.Random(seed)
    arrivals = sorted((draw.uniform(0, 300), draw.choice((0, 1, 100, 1500, 4000))) for _ in range(60))

    def run(asked: bool) -> list[tuple[float, str, int]]:
        link = pipe(12, jitter_ms=4, seed=seed, **options)
        for i, (at_ms, size) in enumerate(arrivals):
            if asked:
                link.serve(round(at_ms * MS))
                link.next_ns(draw.choice((0, 1500)))
            push(link, at_ms, size, str(i))
        return drain(link)

    out = run(False)
    assert run(True) == out
    assert sum(size for _, _, size in out) == sum(size for _, size in arrivals)
    assert all(time_ms >= arrivals[int(to)][0] + 12 - 1e-6 for time_ms, to, _ in out)
    assert [int(to) for _, to, _ in out] == sorted(int(to) for _, to, _ in out)


def test_a_stall_holds_what_is_under_way_and_the_rate_begins_again() -> None:
    link = pipe(10, rate_bps=1_000_000)
    push(link, 0, 6000, "a")
    assert drain(link, 23) == [(22, "a", 1500)]
    link.stall()
    push(link, 30, 1500, "b")
    assert link.next_ns() is None and link.next_ns(100) is None and link.pop(500 * MS) == []
    assert link.queued == 6000
    link.resume(1000 * MS)
    assert [(time_ms, to) for time_ms, to, _ in drain(link)] == [(1012, "a"), (1024, "a"), (1036, "a"), (1048, "b")]


def test_a_stall_loses_opportunities() -> None:
    link = pipe(trace=Trace((10, 20, 30)))
    push(link, 0, 3000)
    link.stall()
    link.resume(25 * MS)
    assert [time_ms for time_ms, _, _ in drain(link)] == [30, 40]


def test_marks_keep_their_place_and_use_nothing() -> None:
    options: list[Callable[[], Pipe[str]]] = [
        lambda: pipe(5, rate_bps=1_000_000),
        lambda: pipe(5, trace=Trace((1, 2))),
        lambda: pipe(5),
    ]
    for make in options:
        link = make()
        for to, size in (("open", 0), ("data", 4000), ("end", 0)):
            push(link, 0, size, to)
        out = drain(link)
        assert list(dict.fromkeys(to for _, to, _ in out)) == ["open", "data", "end"]
        assert ends(out)["open"] == 5 and ends(out)["end"] == ends(out)["data"]


def test_a_cut_loses_all_and_leaves_a_fresh_link() -> None:
    for options in ({"rate_bps": 100_000}, {"trace": Trace((100, 200))}):
        link = pipe(50, **options)
        push(link, 0, 3000)
        link.serve(100 * MS)
        assert link.clear(110 * MS) == 3000 and link.next_ns() is None and link.queued == 0
        push(link, 110, 125)
        assert ends(drain(link)) == {"a": 170 if "rate_bps" in options else 200}
