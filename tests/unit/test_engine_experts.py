"""Mixtures of experts, resident and read from flash while steps compute: the same bits, and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from isthmus.edge.experts.store import ExpertStore
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.native_part import chain
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import EngineError
from isthmus.quant import nested
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.roles import Weights
from tests.native_tools import ALL, kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record, record_bytes, stored

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
    written = (part := open_part(apart)).record(40)  # routers' weights, by which experts are told from each other
    run_tokens(part, part.open(), TEXT, [40])
    assert written is not None and written.weights.std() > 0.05
    np.testing.assert_allclose(written.weights.sum(-1), 1, rtol=1e-5)


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
