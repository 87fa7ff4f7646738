"""Mixtures of experts, resident and read from flash while steps compute: the same bits, and clear errors."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
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
from isthmus.engine.native_part import chain
from isthmus.engine.part import Rows, Want
from isthmus.engine.reader import crc32c
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import BundleError, DeviceError, EngineError
from isthmus.quant import nested
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import Records
from isthmus.split.manifest import expert_file
from isthmus.split.roles import Weights
from tests.native_tools import ALL, kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
EXPERTS = ExpertsConfig(n_experts=8, top_k=2, d_expert=40)
TEXT = some_tokens(40)


@pytest.fixture(scope="module", params=["q4", "f32", "n8"])
def model(request: pytest.FixtureRequest) -> RandomModel:
    return RandomModel(request.param, random_config(experts=EXPERTS))


@pytest.fixture(scope="module")
def bundle(model: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return stored(model, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def nested_bundle(tmp_path: Path) -> Bundle:
    return stored(RandomModel("n8", random_config(experts=EXPERTS)), tmp_path / "nested")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("room", [3, 8, 11, 24])
@pytest.mark.parametrize("foresee", [False, True])
def test_few_experts_in_memory_change_no_bit(
    model: RandomModel, bundle: Bundle, threads: int, room: int, foresee: bool
) -> None:
    whole = open_part(model)
    one = whole.open()
    expected = run_tokens(whole, one, TEXT, [40])
    budget = room * record_bytes(bundle)
    with paged(bundle, budget, threads=threads, foresee=foresee) as (part, store):
        for steps in ([1] * 40, [40], [13, 1, 26]):
            sequence = part.open()
            found = run_tokens(part, sequence, TEXT, steps)
            assert found[0].tobytes() == expected[0].tobytes() and found[1].tobytes() == expected[1].tobytes()
            assert found[2] == expected[2] and kv_bytes(sequence) == kv_bytes(one)
            sequence.close()
        report = store.report()
        assert 0 < report.resident <= report.most <= budget
        assert report.evicted == 0 if room == 24 else report.evicted > 0 or room > 3
        assert (report.read_ahead > 0) == foresee
        layers = [store.tables.layer(i).report() for i in range(3)]
        assert all(sum(layer["taken"]) >= sum(layer["missed"]) for layer in layers) and sum(layers[0]["missed"])
        assert all((layer["foreseen"] > 0) == (foresee and i > 0) for i, layer in enumerate(layers))


def test_mixed_rows_in_every_segment(model: RandomModel, bundle: Bundle) -> None:
    """Rows that enter and leave in the middle, with experts that must change in between."""
    hidden = np.random.default_rng(0).standard_normal((5, model.config.d_model)).astype(np.float32)
    results = []
    room = 4 * record_bytes(bundle)
    with paged(bundle, room) as (one, _), paged(bundle, room, threads=2) as (two, _):
        for part in (open_part(model), one, two):
            a, b, c = part.open(), part.open(), part.open()
            rows = Rows().tokens(a, 0, TEXT[:9], leave=2, want=Want.HIDDEN, want_all=True)
            rows.hidden(b, 0, hidden, enter=1, want=ALL).tokens(c, 0, TEXT[3:6], want=ALL, want_all=True)
            result = part.step(rows)
            results.append((result.hidden.tobytes(), result.logits.tobytes(), result.tokens))
    assert results[0] == results[1] == results[2]


def test_a_chain_shares_one_store(model: RandomModel, bundle: Bundle) -> None:
    whole = open_part(model)
    expected = run_tokens(whole, whole.open(), TEXT, [40])
    store = ExpertStore(bundle, 5 * record_bytes(bundle))
    source = bundle.without_experts()
    linked = chain([open_part(source, i, i + 1, experts=store) for i in range(3)])
    for steps in ([40], [1] * 40):
        found = run_tokens(linked, linked.open(), TEXT, steps)
        assert found[0].tobytes() == expected[0].tobytes()
    linked.close()
    store.close()


def test_planes_by_share_are_the_same_resident_and_read(nested_bundle: Bundle) -> None:
    tolerance = np.tile(np.array([0.1, 0.45, 0.7], np.float32), (3, 1))
    whole = open_part(nested_bundle)
    plain, _, _ = run_tokens(whole, whole.open(), TEXT, [40])
    whole.tolerate(tolerance)
    expected, _, _ = run_tokens(whole, whole.open(), TEXT, [40])
    assert not np.allclose(plain, expected)
    with paged(nested_bundle, 4 * record_bytes(nested_bundle), threads=2) as (part, store):
        part.tolerate(tolerance)
        for steps in ([1] * 40, [40], [13, 1, 26]):
            found, _, _ = run_tokens(part, part.open(), TEXT, steps)
            assert found.tobytes() == expected.tobytes()
        taken = np.sum([store.tables.layer(i).report()["taken"] for i in range(3)], axis=0)
        assert taken[0] > taken[1] > taken[2] > 0
    whole.tolerate(None)
    again, _, _ = run_tokens(whole, whole.open(), TEXT, [40])
    assert again.tobytes() == plain.tobytes()
    for wrong in (tolerance[:, ::-1], tolerance[:2], tolerance[:, :2]):
        with pytest.raises(EngineError, match="ascending"):
            whole.tolerate(wrong)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_so_many_planes_are_the_model_in_so_many_bits(nested_bundle: Bundle, planes: int) -> None:
    format, least = nested.WIDTHS[planes - 1], np.full((3, 3), 9.0, np.float32)
    least[:, :planes] = 0
    narrow = RandomModel("n8", random_config(experts=EXPERTS))
    for layer in narrow.layers:
        for name, matrix in layer.items():
            if name.startswith("experts."):
                layer[name] = nested.view(cast(PackedMatrix, matrix), format)
    expected_part = open_part(narrow)
    expected, _, _ = run_tokens(expected_part, expected_part.open(), TEXT, [40])
    resident = open_part(nested_bundle)
    resident.tolerate(least)
    with paged(nested_bundle, 4 * record_bytes(nested_bundle), planes=planes) as (part, _):
        for one in (resident, part):
            found, _, _ = run_tokens(one, one.open(), TEXT, [1] * 40)
            assert found.tobytes() == expected.tobytes()


def rotating(chosen: list[list[int]]) -> Routing:
    """Experts of a single layer."""
    named = np.array(chosen, np.int32)[:, None]
    return Routing(named, np.full(named.shape, 0.3, np.float32), named)


def record(chosen: list[list[int]]) -> Routing:
    """The same experts in all three layers, foreseen rightly."""
    named: NDArray[np.int32] = np.repeat(np.array(chosen, np.int32)[:, None], 3, axis=1)
    return Routing(named, np.full(named.shape, 0.5, np.float32), named)


def test_recorded_routing_is_followed(model: RandomModel, bundle: Bundle) -> None:
    """Every position takes what the record says, over and over; a mixture of one expert only is that expert."""
    part = open_part(model)
    own, _, _ = run_tokens(part, part.open(), TEXT, [40])
    part.replay(record([[0, 1], [2, 3]]))
    found, _, _ = run_tokens(part, part.open(), TEXT, [40])
    assert not np.allclose(own, found)
    with paged(bundle, 24 * record_bytes(bundle)) as (other, store):
        other.replay(record([[0, 1], [2, 3]]))
        again, _, _ = run_tokens(other, other.open(), TEXT, [1] * 40)
        assert again.tobytes() == found.tobytes()
        assert (store.tables.count[:, :4, 0] == 20).all() and not store.tables.count[:, 4:].any()
        right = [store.tables.layer(i).report() for i in range(3)]
        assert [(one["foreseen"], one["foreseen_right"]) for one in right] == [(0, 0), (80, 80), (80, 80)]
    part.replay(None)
    back, _, _ = run_tokens(part, part.open(), TEXT, [40])
    assert back.tobytes() == own.tobytes()
    for wrong in (record([[0, 8]]), record([[0, 1, 2]]), record([[0, -1]])):
        with pytest.raises(EngineError, match="recorded routing"):
            part.replay(wrong)


def test_what_was_recorded_replays_to_the_same_bits(model: RandomModel) -> None:
    part = open_part(model, threads=2)
    own, _, _ = run_tokens(part, part.open(), TEXT, [40])
    written = part.record(30)
    assert written is not None
    again, _, _ = run_tokens(part, part.open(), TEXT, [13, 1, 26])
    assert again.tobytes() == own.tobytes()
    part.record(0)
    assert (written.weights > 0).all() and (np.diff(written.weights, axis=2) <= 0).all()
    assert (written.foreseen[:, 0] == written.chosen[:, 0]).all() and (written.foreseen != written.chosen).any()
    other = open_part(model)
    other.replay(written)
    found, _, _ = run_tokens(other, other.open(), TEXT[:30], [1] * 30)
    assert found.tobytes() == own[:30].tobytes()
    with pytest.raises(EngineError, match="no layer has experts"):
        open_part(RandomModel("q4", random_config())).record(3)


@pytest.mark.parametrize(("policy", "stays"), [("lru", 4), ("lfu", 0), ("lfru", 0)])
def test_policies_differ_in_what_leaves(bundle: Bundle, policy: str, stays: int) -> None:
    """Experts 0 and 1 are taken often, then 2 to 5 once each: who was used often outlives who was used last, or not."""
    steps = [[0, 1]] * 8 + [[2, 3], [4, 5]]
    with paged(bundle, 12 * record_bytes(bundle), policy=policy, foresee=False) as (part, store):
        part.replay(record(steps))
        run_tokens(part, part.open(), TEXT[:10], [1] * 10)
        held = (store.tables.ready() > 0).sum(axis=0)
        assert held[stays] == held[stays + 1] == 3 and held.sum() == 12


def test_a_budget_below_the_floor_names_the_least(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="does not hold the experts that one layer needs at once") as raised:
        ExpertStore(bundle, 2 * record_bytes(bundle))
    least = float(raised.value.remedy.split()[3])
    ExpertStore(bundle, int(least * 1e6)).close()
    with pytest.raises(DeviceError, match="policy"):
        ExpertStore(bundle, 1 << 30, policy="none")


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


def test_the_weights_of_experts_are_the_softmax_of_the_router() -> None:
    """Against a float64 mixture of the same experts, each alone as a dense model of one layer."""
    for renormalize in (True, False):
        experts = ExpertsConfig(4, 3, 40, renormalize)
        model = RandomModel("f32", random_config(n_layers=1, experts=experts))
        part = open_part(model, format="f32")
        state = np.random.default_rng(1).standard_normal((1, model.config.d_model)).astype(np.float32)
        out = part.step(Rows().hidden(part.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0]
        layer = model.layers[0]
        deltas, after = [], None
        for e in range(4):
            dense = RandomModel("f32", random_config(n_layers=1))
            dense.layers[0] = {k: v for k, v in layer.items() if not k.startswith(("experts", "router"))}
            dense.layers[0] |= {n: layer[f"experts.{e}.{n}"] for n in ("gate", "up", "down")}
            alone = open_part(dense, format="f32")
            deltas.append(alone.step(Rows().hidden(alone.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0])
            zero = cast(PackedMatrix, dense.layers[0]["down"])
            nothing = {"w": np.zeros_like(zero.arrays["w"])}
            dense.layers[0]["down"] = PackedMatrix("f32", zero.rows, zero.cols, nothing)
            alone = open_part(dense, format="f32")
            after = alone.step(Rows().hidden(alone.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0]
        assert after is not None
        x = after.astype(np.float64)
        normed = x / np.sqrt((x**2).mean() + 1e-5) * cast("np.ndarray", layer["ffn_norm"])
        scores = cast("np.ndarray", layer["router"]).astype(np.float64) @ normed
        p = np.exp(scores - scores.max())
        p /= p.sum()
        best = np.argsort(-p)[:3]
        weights = p[best] / (p[best].sum() if renormalize else 1)
        expected = x + sum(w * (deltas[e] - x) for w, e in zip(weights, best, strict=True))
        assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_experts_that_are_not_weighed_count_in_full() -> None:
    one = RandomModel("f32", random_config(experts=ExpertsConfig(1, 1, 40)))
    apart = RandomModel("f32", random_config(experts=ExpertsConfig(2, 2, 20, weigh=False)))
    whole = [one.layer(index) for index in range(one.config.n_layers)]
    routers = [apart.layer(index)["router"] for index in range(one.config.n_layers)]

    def halves(index: int) -> Weights:
        found = {name: value for name, value in whole[index].items() if not name.startswith("experts.")}
        found["router"] = routers[index]
        for name in ("gate", "up", "down"):
            w = dequantize(cast(PackedMatrix, whole[index][f"experts.0.{name}"]))
            for e, half in enumerate(np.split(w, 2, axis=1 if name == "down" else 0)):
                found[f"experts.{e}.{name}"] = quantize(np.ascontiguousarray(half), "f32")
        return found

    apart.layer = halves  # type: ignore[method-assign]
    found = []
    for model in (one, apart):
        part = open_part(model)
        found.append(run_tokens(part, part.open(), TEXT, [40])[0])
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_a_pre_gate_names_experts_one_layer_ahead(tmp_path: Path) -> None:
    """A layer's experts are those that its router names from what the layer before reads; all are foreseen rightly."""
    plain = RandomModel("f32", random_config(experts=EXPERTS))
    gated = RandomModel("f32", random_config(experts=replace(EXPERTS, pre_gate=True)))
    usual, part = open_part(plain), open_part(gated)
    own, _, _ = run_tokens(usual, usual.open(), TEXT, [40])
    expected, _, _ = run_tokens(part, part.open(), TEXT, [40])
    assert not np.allclose(own, expected)
    bundle = stored(gated, tmp_path / "gated")
    with paged(bundle, 6 * record_bytes(bundle), threads=2) as (other, store):
        for steps in ([1] * 40, [13, 1, 26]):
            found, _, _ = run_tokens(other, other.open(), TEXT, steps)
            assert found.tobytes() == expected.tobytes()
        for layer in (1, 2):
            told = store.tables.layer(layer).report()
            assert told["foreseen"] == told["foreseen_right"] > 0
    linked = chain([open_part(gated, i, i + 1) for i in range(3)])
    found, _, _ = run_tokens(linked, linked.open(), TEXT, [7] * 5 + [5])
    assert found.tobytes() == expected.tobytes()
    with pytest.raises(EngineError, match="chosen in the layer before"):
        part.step(Rows().hidden(part.open(), 0, np.ones((1, 72), np.float32), enter=1, want=Want.SAMPLE))
