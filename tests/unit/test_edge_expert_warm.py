"""Experts of a placement are there before the first token, and nothing that a model says depends on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.warm import check, warm, within
from isthmus.edge.holding import Holding
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.placement import Placement
from isthmus.protocol.errors import BundleError, DeviceError, EngineError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import expert_file
from tests.native_tools import run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record, record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(12)
MEMORY = [[5, 1, 4], [], [2, 0, 3, 6, 7]]  # by layer; one less than a token takes twice, none, and one more
USES = np.linspace(0.1, 0.9, 24).reshape(3, 8)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return stored(RandomModel("n8", random_config(experts=ExpertsConfig(8, 2, 40))), tmp_path / "bundle")


def placed(bundle: Bundle, **other: object) -> Placement:
    stands = tuple(tuple(int(e not in row) for e in range(8)) for row in MEMORY)
    uses = tuple(map(tuple, USES.tolist()))
    fields = {"model": bundle.model_id, "name": "random", "kind": "device", "places": ("memory", "flash")}
    return Placement(**{**fields, "stands": stands, "uses": uses, **other})  # type: ignore[arg-type]


def test_memorys_experts_and_no_others_are_read(bundle: Bundle) -> None:
    with paged(bundle, 12 * record_bytes(bundle), foresee=False) as (part, store):
        assert warm(part, store, placed(bundle)) == 8
        held = [np.flatnonzero(row).tolist() for row in store.tables.ready() == 3]
        assert held == [sorted(row) for row in MEMORY]
        report = ExpertReport.of(store)
        assert sum(report.taken) == 0 and report.read_bytes == 8 * record_bytes(bundle)
        part.replay(record([[4, 5]]))
        run_tokens(part, part.open(), TEXT[:1], [1])
        report = ExpertReport.of(store)
        # Nested experts have three planes: both are there in the first layer, none in the others.
        assert report.taken == (6, 6, 6) and report.in_memory == (6, 0, 0)


def test_the_text_is_the_same_and_the_router_speaks_again(bundle: Bundle) -> None:
    texts = []
    for warmed in (False, True):
        with paged(bundle, 12 * record_bytes(bundle)) as (part, store):
            if warmed:
                warm(part, store, placed(bundle))
            texts.append(run_tokens(part, part.open(), TEXT, [1] * len(TEXT))[0])
            assert part.free_tokens > 0 and store.foresee
    np.testing.assert_array_equal(texts[0], texts[1])


def test_a_tolerance_neither_hinders_nor_is_lost(bundle: Bundle) -> None:
    """All planes are read, whatever shares they are worth; steps then read as few as before."""
    table = np.full((3, 3), 0.9, np.float32)
    texts = []
    for warmed in (False, True):
        with paged(bundle, 12 * record_bytes(bundle), foresee=False) as (part, store):
            store.tolerance = table
            part.tolerate(table)
            if warmed:
                assert warm(part, store, placed(bundle)) == 8
                assert (store.tables.ready() == 3).sum() == 8
            texts.append(run_tokens(part, part.open(), TEXT, [1] * len(TEXT))[0])
    np.testing.assert_array_equal(texts[0], texts[1])


def test_what_the_text_used_most_stays_longest(bundle: Bundle) -> None:
    """LFRU begins with the placement's uses: of all in memory the least used leaves first."""
    with paged(bundle, 8 * record_bytes(bundle), foresee=False) as (part, store):
        warm(part, store, placed(bundle))
        part.replay(record([[5, 4]]))  # lacks two in each of the second and the third layer
        run_tokens(part, part.open(), TEXT[:1], [1])
        gone = [e for e in MEMORY[2] if not store.tables.ready()[2, e]]
        assert not store.tables.ready()[0, 1] and 7 not in gone and 6 not in gone


def test_a_smaller_budget_takes_the_most_used(bundle: Bundle) -> None:
    with paged(bundle, 4 * record_bytes(bundle)) as (part, store):
        assert [row.tolist() for row in within(placed(bundle), store)] == [[], [], [2, 3, 6, 7]]
        assert warm(part, store, placed(bundle)) == 4
        assert np.flatnonzero(store.tables.ready()[2]).tolist() == [2, 3, 6, 7]


def holding(bundle: Bundle, path: Path) -> Holding:
    experts = ExpertSettings(12 * record_bytes(bundle) / 1e6, placement=path)
    return Holding(bundle, memory_mb=None, kv_tokens=64, window=0, backend="native", threads=1, experts=experts)


def test_a_device_opens_with_them(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(placed(bundle).encoded())
    found = holding(bundle, tmp_path / "p.json")
    found.open(3)
    assert found.store is not None and (found.store.tables.ready() > 0).sum() == 8
    found.close()


def test_a_damaged_expert_is_told_when_the_device_opens(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(placed(bundle).encoded())
    with (bundle.path / expert_file(2)).open("r+b") as file:
        file.seek(bundle.records(2).offset(6, 0) + 5)
        file.write(b"\xff\x00\xff")
    found = holding(bundle, tmp_path / "p.json")
    with pytest.raises(BundleError, match="expert 6 of layer 2"):
        found.open(3)
    found.close()


def test_other_placements_are_refused(bundle: Bundle) -> None:
    check(placed(bundle), bundle)
    with pytest.raises(DeviceError, match="the placement is for random"):
        check(placed(bundle, model="0" * 32), bundle)
    with pytest.raises(DeviceError, match="one of workers"):
        check(placed(bundle, kind="workers"), bundle)
    with pytest.raises(DeviceError, match="other layers or experts"):
        check(placed(bundle, stands=((0,) * 8,) * 2, uses=((0.1,) * 8,) * 2), bundle)


def test_experts_that_are_chosen_a_layer_ahead_cannot_be_read_alone(tmp_path: Path) -> None:
    ahead = ExpertsConfig(8, 2, 40, pre_gate=True)
    bundle = stored(RandomModel("n8", random_config(experts=ahead)), tmp_path / "ahead")
    with pytest.raises(DeviceError, match="one layer ahead"):
        check(placed(bundle), bundle)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no placement"),
        (b'{"format":"isthmus-plan"}', "no placement"),
        (b"[" * 5000, "no placement"),
        (b"\xff\xfe", "no placement"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_placement_is_refused(tmp_path: Path, data: bytes | None, why: str) -> None:
    path = tmp_path / "p.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EngineError, match=why):
        Placement.load(path)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"version": 9}, "version 9"),
        ({"uses": ((0.1,) * 7,) * 3}, "other experts than uses"),
        ({"stands": ((2,) * 8,) * 3}, "none of its 2"),
        ({"uses": ((1.5,) * 8,) * 3}, "shares of tokens"),
    ],
)
def test_a_placement_that_contradicts_itself_is_refused(bundle: Bundle, other: dict[str, object], why: str) -> None:
    with pytest.raises(EngineError, match=why):
        placed(bundle, **other)
