"""With how few bits experts may be read: errors, shares, the certificate, and a device that reads no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.store import ExpertStore
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.native_part import open_native
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import BundleError, DeviceError, ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import Manifest
from isthmus.split.rewriting import put_tolerance
from isthmus.split.tolerance import NEVER, Tolerance
from isthmus.split.tolerance_run import LEAST_DOCUMENTS, STEPS, Read, calibrate, errors, read, rise
from isthmus.split.tolerance_shares import BITS, mean_bits, shares, shares_within
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
EXPERTS = ExpertsConfig(n_experts=8, top_k=3, d_expert=40)
TEXT = some_tokens(40)
DOCUMENTS = [some_tokens(20, seed=i) for i in range(LEAST_DOCUMENTS)]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return stored(RandomModel("n8", random_config(experts=EXPERTS)), tmp_path / "nested")


def found(bundle: Bundle, least: float = 0.05) -> Tolerance:
    """A tolerance that nobody measured."""
    table = shares(errors(bundle), least)
    return Tolerance(
        shares=tuple(tuple(map(float, row)) for row in table),
        model_id=bundle.model_id,
        data="ab" * 32,
        documents=40,
        tokens=800,
        within=0.01,
        confidence=0.95,
        exact=10.0,
        bounded=10.05,
        bound=0.009,
        bits=3.1,
    )


def quiet(_: str) -> object:
    return lambda done, total: None


def test_more_planes_leave_less_error(bundle: Bundle) -> None:
    off = errors(bundle)
    assert off.shape == (3, 4)
    assert (off[:, 0] == 1).all() and (off[:, 3] == 0).all() and (np.diff(off, axis=1) < 0).all()


def test_only_nested_experts_can_be_read_with_fewer_bits(tmp_path: Path) -> None:
    plain = stored(RandomModel("q8", random_config(experts=EXPERTS)), tmp_path / "plain")
    with pytest.raises(ModelError, match="not nested"):
        errors(plain)


def test_a_share_pays_for_its_planes() -> None:
    table = shares(np.array([[1.0, 0.5, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.1, 0.1, 0.0]]), 0.02)
    np.testing.assert_allclose(table[0], [0.04, 0.05, 0.4], rtol=1e-6)
    assert not table[1].any()  # a layer without experts
    assert table[2, 1] == table[2, 2] == np.float32(NEVER)  # what takes nothing away is never read


def test_bits_are_a_mean_over_layers_with_experts() -> None:
    weights = np.array([[[0.75, 0.25], [0, 0]], [[0.5, 0.5], [0, 0]]], np.float32)  # the second layer has none
    table = np.array([[0.0, 0.5, 0.7], [0, 0, 0]], np.float32)
    assert mean_bits(weights, table) == (8 + 2 + 4 + 4) / 4


@pytest.mark.parametrize("bits", [0.5, 2.0, 3.0, 5.0, 8.0])
def test_shares_read_no_more_bits_than_asked_for(bits: float) -> None:
    rng = np.random.default_rng(1)
    off = np.sort(rng.random((5, 4)), axis=1)[:, ::-1].copy()
    off[:, 0], off[:, 3] = 1, 0
    weights = rng.dirichlet(np.ones(4), (300, 5)).astype(np.float32)
    found = mean_bits(weights, shares_within(off, weights, bits))
    assert bits - 0.05 < found <= bits
    alone = np.ones((300, 5, 1), np.float32)  # one expert, whose share is all
    assert mean_bits(alone, shares_within(off, alone, bits)) <= bits


def test_bits_and_losses_are_those_of_the_engine(bundle: Bundle) -> None:
    part = open_part(bundle)
    table = shares(errors(bundle), 0.05)
    exact, other = read(part, [TEXT], None), read(part, [TEXT], table)
    sequence, routing = part.open(), part.record(len(TEXT))
    assert routing is not None
    logits = part.step(Rows().tokens(sequence, 0, TEXT, want=Want.LOGITS, want_all=True)).logits
    assert logits is not None
    likely = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(exact.losses, -likely[np.arange(len(TEXT) - 1), TEXT[1:]].sum(), rtol=1e-5)
    assert np.isnan(exact.bits) and other.losses != exact.losses
    bits = []
    part.tolerate(table)
    again, routing = part.open(), part.record(len(TEXT))
    part.step(Rows().tokens(again, 0, TEXT, want=Want.NONE))
    assert routing is not None
    for position in routing.weights:
        for layer, weights in enumerate(position):
            for weight in weights:
                planes = 0
                while planes < 3 and weight >= table[layer, planes] * weights.sum():
                    planes += 1
                bits.append(BITS[planes])
    assert other.bits == pytest.approx(np.mean(bits), rel=1e-6) and 0 < other.bits < 8
    part.close()


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Documents that lose 1 % in truth: a bound with confidence 0.9 is below that in about a tenth of draws."""
    rng, lengths = np.random.default_rng(0), np.full(100, 50)
    below = 0
    for _ in range(400):
        lost = 50 * np.log(1.01) + rng.standard_normal(100)
        exact = Read(rng.uniform(100, 200, 100), np.nan)
        below += rise(exact, Read(exact.losses + lost, 3.0), lengths, 0.9) < 0.01
    assert 0.05 < below / 400 < 0.15


def test_a_bound_is_larger_the_surer_it_is() -> None:
    rng, lengths = np.random.default_rng(1), np.full(60, 50)
    exact = Read(np.full(60, 100.0), np.nan)
    other = Read(exact.losses + 0.5 + rng.standard_normal(60), 3.0)
    bounds = [rise(exact, other, lengths, confidence) for confidence in (0.6, 0.9, 0.99)]
    assert bounds == sorted(bounds)
    assert rise(exact, exact, lengths, 0.95) == pytest.approx(0, abs=1e-9)


def test_it_stops_behind_the_first_step_that_is_too_much(bundle: Bundle) -> None:
    part = open_part(bundle)
    tried = list(calibrate(bundle, part, DOCUMENTS, within=0.02, confidence=0.95, tell=quiet))  # type: ignore[arg-type]
    steps = [one.step for one, _ in tried]
    assert steps == list(range(len(tried)))
    assert [one.passed for one, _ in tried[:-1]] == [True] * (len(tried) - 1)
    assert not tried[-1][0].passed or len(tried) == len(STEPS)
    assert [one.bits for one, _ in tried] == sorted((one.bits for one, _ in tried), reverse=True)
    for one, tolerance in tried:
        assert (tolerance is not None) == one.passed
        if tolerance is not None:
            tolerance.check(bundle.config, bundle.model_id)
            assert tolerance.bound <= 0.02
    part.close()


def test_bad_calibrations(bundle: Bundle) -> None:
    part = open_part(bundle)

    def run(documents: list[list[int]], within: float, confidence: float) -> None:
        list(calibrate(bundle, part, documents, within=within, confidence=confidence, tell=quiet))  # type: ignore[arg-type]

    with pytest.raises(ModelError, match="within 0 is impossible"):
        run(DOCUMENTS, 0, 0.95)
    with pytest.raises(ModelError, match="confidence 1 is impossible"):
        run(DOCUMENTS, 0.01, 1)
    with pytest.raises(ModelError, match=r"3 documents are too few \(.*give at least 30|3 documents are too few"):
        run(DOCUMENTS[:3], 0.01, 0.95)
    part.close()


def test_a_bundle_keeps_it(bundle: Bundle) -> None:
    tolerance = found(bundle)
    put_tolerance(bundle.path, tolerance)
    opened = Bundle.open(bundle.path)
    assert opened.manifest.tolerance == tolerance and opened.model_id == bundle.model_id
    put_tolerance(bundle.path, None)
    assert Bundle.open(bundle.path).manifest.tolerance is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_id": "0" * 32}, "another model"),
        ({"shares": ((0.1, 0.2, 0.3),)}, "cannot be"),
        ({"shares": ((0.3, 0.2, 0.1),) * 3}, "cannot be"),
        ({"shares": ((0.1, 0.2, float("inf")),) * 3}, "cannot be"),
        ({"shares": ((),) * 3}, "cannot be"),
        ({"data": "zz"}, "cannot be"),
        ({"documents": 0}, "cannot be"),
        ({"bits": -1.0}, "cannot be"),
        ({"bound": 0.5}, "bounds the rise by 50.00%"),
    ],
)
def test_values_that_cannot_be_are_refused(bundle: Bundle, change: dict[str, object], said: str) -> None:
    wrong = msgspec.structs.replace(found(bundle), **change)
    with pytest.raises(BundleError, match=said):
        wrong.check(bundle.config, bundle.model_id)
    if "inf" not in str(change):
        data = json.loads(bundle.manifest.encode())
        data["tolerance"] = msgspec.to_builtins(wrong)
        with pytest.raises(BundleError, match=said):
            Manifest.parse(json.dumps(data).encode())


def test_a_dense_model_has_none(tmp_path: Path, bundle: Bundle) -> None:
    dense = replace(bundle.config, experts=None)
    with pytest.raises(BundleError, match="cannot be"):
        found(bundle).check(dense, bundle.model_id)


def test_a_device_reads_no_more_than_is_asked_for(bundle: Bundle) -> None:
    """The same bits as in memory with the same tolerance, from fewer bytes."""
    put_tolerance(bundle.path, found(bundle))
    opened = Bundle.open(bundle.path)
    whole = open_part(opened)
    exact = run_tokens(whole, whole.open(), TEXT, [1] * len(TEXT))[0]
    whole.tolerate(found(bundle).array(3))
    expected = run_tokens(whole, whole.open(), TEXT, [1] * len(TEXT))[0]
    whole.close()
    read_bytes = {}
    for bounded in (True, False):
        with paged(opened, 5 * record_bytes(opened), bounded=bounded, foresee=False) as (part, store):
            got = run_tokens(part, part.open(), TEXT, [1] * len(TEXT))[0]
            read_bytes[bounded] = store.reader.report().bytes
        if bounded:
            np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(expected, exact)
    assert read_bytes[True] < read_bytes[False]


def test_dense_layers_alone_need_no_tolerance(tmp_path: Path) -> None:
    """As of a model whose first layers have no experts, cut behind them."""
    experts = replace(EXPERTS, dense_layers=(0,))
    bundle = stored(RandomModel("n8", random_config(experts=experts)), tmp_path / "dense first")
    put_tolerance(bundle.path, found(bundle))
    store = ExpertStore(Bundle.open(bundle.path), 100 * record_bytes(bundle), layers=1, bounded=True)
    part = open_native(bundle.without_experts(), 0, 1, threads=1, experts=store)
    part.close()
    store.close()


def test_a_tolerance_needs_all_planes(bundle: Bundle) -> None:
    """What was certified may ask for 8 bits; and one of fewer planes than experts have is of something else."""
    put_tolerance(bundle.path, found(bundle))
    with pytest.raises(DeviceError, match="may need all bits"):
        ExpertStore(Bundle.open(bundle.path), 100 * record_bytes(bundle), planes=2, bounded=True)
    short = tuple(row[:2] for row in found(bundle).shares)
    put_tolerance(bundle.path, msgspec.structs.replace(found(bundle), shares=short))
    with pytest.raises(BundleError, match="of 2 planes, its experts have 3"):
        ExpertStore(Bundle.open(bundle.path), 100 * record_bytes(bundle), bounded=True)


def test_bounded_needs_a_tolerance(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match=r"nobody has measured .* isthmus experts calibrate|nobody has measured"):
        ExpertStore(bundle, 100 * record_bytes(bundle), bounded=True)
    with pytest.raises(DeviceError, match="read 'fast'"):
        ExpertSettings(10, mode="fast")  # type: ignore[arg-type]
