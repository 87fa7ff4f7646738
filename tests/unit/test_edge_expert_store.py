"""Experts on flash: budgets, what leaves, and everything that a file or a disk can do wrong."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.store import ExpertStore
from isthmus.engine import native_layers
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.part import Rows, Want
from isthmus.engine.reader import crc32c
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import BundleError, DeviceError, EngineError
from isthmus.quant.packed import PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import Records
from isthmus.split.manifest import expert_file
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record, record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
EXPERTS = ExpertsConfig(n_experts=8, top_k=2, d_expert=40)
TEXT = some_tokens(40)


@pytest.fixture
def nested_bundle(tmp_path: Path) -> Bundle:
    return stored(RandomModel("n8", random_config(experts=EXPERTS)), tmp_path / "nested")


def rotating(chosen: list[list[int]]) -> Routing:
    """Experts of a single layer."""
    named = np.array(chosen, np.int32)[:, None]
    return Routing(named, np.full(named.shape, 0.3, np.float32), named)


@pytest.mark.parametrize(("policy", "stays"), [("lru", 4), ("lfu", 0), ("lfru", 0)])
def test_policies_differ_in_what_leaves(nested_bundle: Bundle, policy: str, stays: int) -> None:
    """Experts 0 and 1 are taken often, then 2 to 5 once each: who was used often outlives who was used last, or not."""
    steps = [[0, 1]] * 8 + [[2, 3], [4, 5]]
    with paged(nested_bundle, 12 * record_bytes(nested_bundle), policy=policy, foresee=False) as (part, store):
        part.replay(record(steps))
        run_tokens(part, part.open(), TEXT[:10], [1] * 10)
        held = (store.tables.ready() > 0).sum(axis=0)
        assert held[stays] == held[stays + 1] == 3 and held.sum() == 12


def test_a_budget_below_the_floor_names_the_least(nested_bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="does not hold the experts that one layer needs at once") as raised:
        ExpertStore(nested_bundle, 2 * record_bytes(nested_bundle))
    least = float(raised.value.remedy.split()[3])
    ExpertStore(nested_bundle, int(least * 1e6)).close()
    with pytest.raises(DeviceError, match="policy"):
        ExpertStore(nested_bundle, 1 << 30, policy="none")


def damage(bundle: Bundle, layer: int, at: int) -> None:
    with (bundle.path / expert_file(layer)).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("foresee", [False, True])
def test_an_altered_expert_is_found_when_it_is_read(nested_bundle: Bundle, foresee: bool) -> None:
    records = nested_bundle.records(1)
    damage(nested_bundle, 1, records.offset(5, 2) + 100)
    whole = RandomModel("n8", random_config(experts=EXPERTS))
    reference = open_part(whole)
    with paged(nested_bundle, 8 * record_bytes(nested_bundle), foresee=foresee) as (part, _):
        for routing in (record([[0, 1]]), record([[2, 5]])):
            part.replay(routing)
            reference.replay(routing)
            sequence = part.open()
            if routing.chosen[0, 0, 0] == 0:
                found = run_tokens(part, sequence, TEXT[:5], [1] * 5)
                assert found[0].tobytes() == run_tokens(reference, reference.open(), TEXT[:5], [5])[0].tobytes()
                continue
            for _ in range(2):  # it stays so
                with pytest.raises(BundleError, match=r"expert 5 of layer 1 in experts-001.*a checksum does not match"):
                    part.step(Rows().tokens(sequence, 0, TEXT[:1]))
                assert sequence.length == 0


def test_a_file_that_ends_is_one_error(nested_bundle: Bundle) -> None:
    with paged(nested_bundle, 8 * record_bytes(nested_bundle), foresee=False) as (part, _):
        os.truncate(nested_bundle.path / expert_file(2), nested_bundle.records(2).start)
        with pytest.raises(BundleError, match="ends too early"):
            part.step(Rows().tokens(part.open(), 0, TEXT[:1]))


def test_a_disk_that_fails_is_one_error(nested_bundle: Bundle) -> None:
    with paged(nested_bundle, 8 * record_bytes(nested_bundle), foresee=False) as (part, store):
        os.dup2(folder := os.open("/", os.O_RDONLY), store._files[1])
        os.close(folder)
        with pytest.raises(DeviceError, match=r"layer 1.*cannot be read: Is a directory"):
            part.step(Rows().tokens(part.open(), 0, TEXT[:1]))


def test_a_disk_that_stalls_is_one_error(nested_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "PATIENCE", 0.02)
    with paged(nested_bundle, 8 * record_bytes(nested_bundle), bytes_per_second=200_000.0) as (part, _):
        sequence = part.open()
        with pytest.raises(DeviceError, match="the disk does not give"):
            part.step(Rows().tokens(sequence, 0, TEXT[:1]))
        assert sequence.length == 0 and part.free_tokens == 1024


def test_a_slower_device_takes_its_time(nested_bundle: Bundle) -> None:
    """All bytes pass through the pretended device, which was busy for as long as it takes them."""
    rate = 2_000_000.0
    with paged(nested_bundle, 24 * record_bytes(nested_bundle), bytes_per_second=rate, foresee=False) as (part, store):
        run_tokens(part, part.open(), TEXT[:4], [1] * 4)
        report = store.reader.report()
        assert report.bytes > 100_000 and report.busy >= 0.9 * report.bytes / rate


def test_damaged_headers_are_refused(nested_bundle: Bundle) -> None:
    path, config = nested_bundle.path / expert_file(0), nested_bundle.config
    good, start = path.read_bytes(), nested_bundle.records(0).start
    sums = json.loads(json.loads(good[8:start])["__metadata__"]["experts"])["crc32c"]
    long = next(str(one) for row in sums for one in row if len(str(one)) == 10)
    for old, new, says in (
        (b'"experts.3.up.p1"', b'"experts.3.up.pX"', "no up.p1 of expert 3 in its place"),
        (b"crc32c", b"crc32d", "does not describe its experts"),
        (long.encode(), b"9999999999", "holds no 8 experts of 3 planes"),
    ):
        bad = good.replace(old, new)
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(BundleError, match="its header is another one"):
            nested_bundle.records(0)
        with pytest.raises(BundleError, match=says):
            Records.open(path, config, hashlib.sha256(bad[:start]).hexdigest())
    path.write_bytes(good)
    nested_bundle.records(0)


def test_another_layers_experts_are_refused(nested_bundle: Bundle) -> None:
    one, two = (nested_bundle.path / expert_file(layer) for layer in (0, 1))
    one.rename(spare := one.with_suffix(".spare"))
    two.rename(one)
    spare.rename(two)
    with pytest.raises(BundleError, match="another model's or layer's"):
        ExpertStore(nested_bundle, 8 * (1 << 20))


def test_first_planes_of_many_do_not_keep_each_other_from_the_rest(tmp_path: Path) -> None:
    """At the least budget every expert's first plane is in memory, then many rows want all planes of all of them."""
    model = RandomModel("n4", random_config(n_layers=1, experts=ExpertsConfig(8, 3, 64)))
    bundle, whole = stored(model, tmp_path / "bundle"), open_part(model)
    routing = rotating([[0, 1, 2], [3, 4, 5], [6, 7, 0]])
    with paged(bundle, 4 * record_bytes(bundle), foresee=False) as (part, store):
        results = []
        for one in (part, whole):
            one.replay(routing)
            one.tolerate(np.array([[0, 9]], np.float32))
            sequence = one.open()
            one.step(Rows().tokens(sequence, 0, TEXT))
            one.tolerate(None)
            results.append(one.step(Rows().tokens(sequence, 40, TEXT, want=Want.LOGITS, want_all=True)).logits)
        assert results[0].tobytes() == results[1].tobytes()
        assert store.report().most <= 4 * record_bytes(bundle)


def test_a_guess_that_cannot_be_read_counts_for_nothing(nested_bundle: Bundle) -> None:
    """What is read ahead may fail; when the expert is wanted it is read anew."""
    records = nested_bundle.records(1)
    where = records.offset(5, 0) + 7
    damage(nested_bundle, 1, where)
    named: NDArray[np.int32] = np.array([[[0, 1]] * 3], np.int32)
    wrong = named.copy()
    wrong[:, 1] = [5, 6]
    with paged(nested_bundle, 12 * record_bytes(nested_bundle)) as (part, store):
        part.replay(Routing(named, np.full(named.shape, 0.5, np.float32), wrong))
        sequence = part.open()
        for at in range(3):
            part.step(Rows().tokens(sequence, at, TEXT[at : at + 1]))
        damage(nested_bundle, 1, where)  # whole again
        part.replay(record([[5, 6]]))
        part.step(Rows().tokens(sequence, 3, TEXT[3:4]))
        assert store.tables.present[1, 5] == 7


@pytest.mark.parametrize("right", [False, True])
def test_what_is_read_ahead_goes_on_where_it_is_wanted_and_is_dropped_where_not(tmp_path: Path, right: bool) -> None:
    """Each guess is under way, and not there yet, when its layer says what it takes."""
    size: dict[str, Any] = {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
    model = RandomModel("n8", random_config(experts=ExpertsConfig(8, 1, 1024), **size))
    bundle, whole = stored(model, tmp_path / "bundle"), open_part(model)
    chosen = np.arange(24).reshape(24, 1, 1) % 8 + np.zeros((1, 3, 1), int)
    named: NDArray[np.int32] = chosen.astype(np.int32)
    routing = Routing(named, np.ones(named.shape, np.float32), named if right else (named + 4) % 8)
    with paged(bundle, 4 * record_bytes(bundle), bytes_per_second=5e7) as (part, store):
        found = []
        for one in (part, whole):
            one.replay(routing)
            found.append(run_tokens(one, one.open(), TEXT[:24], [1] * 24)[0].tobytes())
        assert found[0] == found[1]
        read, held = store.reader.report(), store.report()
        assert held.most <= 4 * record_bytes(bundle)
        if right:
            assert held.read_ahead == held.taken_ahead > 0 and read.dropped == 0
        else:
            assert read.dropped > 0 and held.taken_ahead == 0


def test_one_store_serves_one_pool_of_threads(nested_bundle: Bundle) -> None:
    with (
        paged(nested_bundle, 8 * record_bytes(nested_bundle), threads=1) as (_, store),
        pytest.raises(EngineError, match="runs on other threads"),
    ):
        open_part(nested_bundle.without_experts(), threads=2, experts=store)


def test_closed_experts_are_one_error(nested_bundle: Bundle) -> None:
    with paged(nested_bundle, 8 * record_bytes(nested_bundle)) as (part, store):
        sequence = part.open()
        store.close()
        with pytest.raises(DeviceError, match="experts are closed"):
            part.step(Rows().tokens(sequence, 0, TEXT[:1]))
        with pytest.raises(DeviceError, match="experts are closed"):
            store.report()
        with pytest.raises(EngineError, match="experts are closed"):
            open_part(nested_bundle.without_experts(), experts=store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_no_readers(nested_bundle: Bundle) -> None:
    with paged(nested_bundle, 8 * record_bytes(nested_bundle)) as (part, _):
        sequence = part.open()
        child = os.fork()
        if not child:
            try:
                part.step(Rows().tokens(sequence, 0, TEXT[:1]))
            except EngineError as error:
                os._exit(0 if "forked" in error.problem else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        part.step(Rows().tokens(sequence, 0, TEXT[:1]))


@pytest.mark.parametrize(
    "wrong",
    [{"budget": 1.5e6}, {"budget": True}, {"layers": 0}, {"layers": 4}, {"planes": -1}, {"planes": 4}, {"threads": 0},
     {"bytes_per_second": float("nan")}, {"bytes_per_second": -1.0}, {"policy": "none"}],
    ids=str,
)  # fmt: skip
def test_numbers_that_make_no_sense(nested_bundle: Bundle, wrong: dict[str, Any]) -> None:
    held = Path("/proc/self/fd")
    before = len(list(held.iterdir())) if held.exists() else 0
    with pytest.raises(DeviceError):
        ExpertStore(**{"bundle": nested_bundle, "budget": 1 << 20, **wrong})
    if before:
        assert len(list(held.iterdir())) == before
    ExpertStore(nested_bundle, 10**30).close()


@pytest.mark.parametrize("wrong", [{"mb": 0}, {"mb": "16"}, {"mb": float("nan")}, {"mb": 1e300}, {"mb": 16, "bits": 3},
                                   {"mb": 16, "flash_mb_s": -1}, {"mb": 16, "flash_mb_s": "x"}], ids=str)  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeviceError):
        ExpertSettings(**wrong)


def test_expert_files_are_safetensors(nested_bundle: Bundle) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors, layer = numpy.load_file(nested_bundle.path / expert_file(1)), nested_bundle.layer(1)
    for expert in range(8):
        matrix = cast(PackedMatrix, layer[f"experts.{expert}.down"])
        for name, array in matrix.arrays.items():
            assert np.array_equal(tensors[f"experts.{expert}.down.{name}"], array)
    records = nested_bundle.records(1)
    assert records.start % 4096 == 0 and all(size % 4096 == 0 for size in records.plane_sizes)


def test_checksums_are_castagnolis() -> None:
    """The check value of the catalogue of parametrised CRC algorithms, and of RFC 3720."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
