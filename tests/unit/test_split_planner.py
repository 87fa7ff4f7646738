"""The rows of a plan: the ends, the best splits, and what they cost."""

from __future__ import annotations

import msgspec
import pytest

from isthmus.protocol.errors import PlanError
from isthmus.split.finalists import Fused
from isthmus.split.onnx_network import MEMORY, Codec, Rate
from isthmus.split.plan import Row, choose
from isthmus.split.planner import Wanted, judged, remeasured, splits, ways
from tests.unit.test_split_profile import WAYS, by_hand, sharing

CODECS = (Codec("f32"), Codec("int8", 8.0, 100.0, 50.0))
RATE = Rate(1.0, 8e6, 80e6)


def test_both_ends_are_rows_and_the_best_splits_of_each_codec_follow() -> None:
    one = sharing(rate=RATE)
    rows = ways(one, CODECS, Wanted())
    assert [row.kind for row in rows[:2]] == ["device", "cloud"]
    assert rows[0].ms == pytest.approx(by_hand(one, {0, 1, 2, 3}))
    assert rows[1].ms == pytest.approx(by_hand(one, set()))
    for row in rows:
        assert row.ms == pytest.approx(row.device_ms + row.cloud_ms + row.link_ms)
    for codec in CODECS:
        coded = sharing(rate=RATE, codec=codec)
        mine = [row for row in rows if row.kind == "split" and row.codec == codec.name]
        assert [row.ms for row in mine] == sorted(row.ms for row in mine)
        real = [by_hand(coded, way) for way in WAYS if 0 < len(way) < 4]
        assert mine[0].ms == pytest.approx(min(real))


def test_a_way_that_breaks_a_budget_says_by_what_and_is_not_chosen() -> None:
    rows = ways(sharing(rate=Rate(1.0, 1e5, 1e6)), CODECS, Wanted(budgets={MEMORY: 12.0}))
    assert rows[0].fails == "15 MB on the device, 12 wanted"
    assert rows[choose(rows)].kind != "device" and not rows[choose(rows)].fails
    with pytest.raises(PlanError, match=r"ms 1e-06 cannot be met"):
        ways(sharing(rate=RATE), CODECS, Wanted(budgets={"ms": 1e-6}))


def test_a_split_that_sends_the_input_is_none() -> None:
    for cut in splits(sharing(rate=RATE), Wanted()):
        assert "x" not in sharing().crossing(cut) and len(set(cut.tiers)) == 2


def test_measured_parts_take_the_place_of_sums_of_nodes() -> None:
    rows = ways(sharing(rate=RATE), CODECS[:1], Wanted())
    split = next(row for row in rows if row.kind == "split")
    found = remeasured(rows, sharing(rate=RATE), lambda row: Fused((1.0,), 2.0) if row is split else None)
    changed = found[rows.index(split)]
    assert (changed.device_ms, changed.cloud_ms) == (1.0, 2.0)
    assert changed.ms == pytest.approx(3.0 + split.link_ms)
    assert [row for row in found if row is not changed] == [row for row in rows if row is not split]


def test_a_way_whose_parts_do_not_run_or_that_no_message_carries_is_not_chosen() -> None:
    rows = ways(sharing(rate=RATE), CODECS[:1], Wanted())
    split = next(row for row in rows if row.kind == "split")

    def timed(row: Row) -> Fused | None:
        if row is split:
            raise PlanError("onnxruntime cannot run a part", "export it again")
        return None

    found = remeasured(rows, sharing(rate=RATE), timed)[rows.index(split)]
    assert judged(found, Wanted()).fails == "its parts do not run by themselves: onnxruntime cannot run a part"
    large = msgspec.structs.replace(split, up_bytes=3e6, leaves=())
    assert not judged(large, Wanted()).fails
    for name in ("up_bytes", "down_bytes"):
        large = msgspec.structs.replace(split, **{name: 12.6e6})
        assert judged(large, Wanted()).fails == "12.6 MB travel at once, and a message takes 5.24"


def test_what_takes_unlike_the_others_is_timed_once_more() -> None:
    rows = [row for row in ways(sharing(rate=RATE), CODECS[:1], Wanted()) if row.kind == "split"]
    late, asked = rows[1], list[str]()

    def timed(row: Row) -> Fused:
        asked.append(row.name)
        disturbed = row is late and asked.count(row.name) == 1
        return Fused((row.device_ms * (3.0 if disturbed else 1.5),), row.cloud_ms * 1.5)

    found = remeasured(rows, sharing(rate=RATE), timed)
    assert len(rows) > 2 and sorted(asked) == sorted([*(row.name for row in rows), late.name])
    for before, after in zip(rows, found, strict=True):
        assert after.device_ms == pytest.approx(1.5 * before.device_ms)
