"""Converted models that are read in nested bits: what is read, and training through the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="making experts needs torch==2.13.0")
pytest.importorskip("scipy")

from torch import Tensor  # noqa: E402

from isthmus.engine.experts import Expert  # noqa: E402
from isthmus.protocol.errors import ModelError  # noqa: E402
from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.nested import WIDTHS, view  # noqa: E402
from isthmus.quant.planes import MATRICES  # noqa: E402
from isthmus.split import moefy_run, moefy_training  # noqa: E402
from isthmus.split.exit_states import Sample  # noqa: E402
from isthmus.split.moefy_decoder import Feed  # noqa: E402
from isthmus.split.moefy_fit import rounded  # noqa: E402
from isthmus.split.moefy_mixture import Batch, Mixture, batches, sent  # noqa: E402
from isthmus.split.moefy_nested import NestedMixture  # noqa: E402
from isthmus.split.moefy_run import MoefyRun, identity  # noqa: E402
from isthmus.split.moefy_source import Shape  # noqa: E402
from isthmus.split.moefy_training import Judge, Recipe, in_nested_bits  # noqa: E402
from isthmus.split.tolerance import NEVER  # noqa: E402
from isthmus.split.tolerance_run import expert_errors  # noqa: E402
from isthmus.split.tolerance_shares import mean_bits  # noqa: E402
from tests.conformance.tiny import VOCAB, Tiny, build  # noqa: E402

EXPERTS, ACTIVE = 4, 2
RNG = np.random.default_rng(11)
SAMPLES = [Sample(RNG.integers(0, VOCAB, int(n)).tolist()) for n in RNG.integers(20, 60, 40)]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moefy_run, "fast_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[False, True], ids=["own", "pre-gate"])
def run(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> MoefyRun:
    return run_in(tiny, tmp_path / "work", pre_gate=request.param)


def run_in(
    tiny: Tiny, work: Path, tell: Callable[[str, int], None] = lambda step, done: None, pre_gate: bool = False
) -> MoefyRun:
    shape = Shape(EXPERTS, ACTIVE, pre_gate)
    return MoefyRun(tiny.source, identity(tiny.source), shape, work, lambda step: lambda done, _: tell(step, done))


def held() -> Batch:
    (batch,) = batches(SAMPLES[:6], 10_000)
    return batch


def read_with(experts: list[Expert], format: str) -> Feed:
    """A layer's stored experts as a width reads them."""
    gate, up, down = (
        [torch.from_numpy(dequantize(view(getattr(expert, name), format))) for expert in experts] for name in MATRICES
    )
    return Feed(torch.cat(gate), torch.cat(up), torch.cat(down, dim=1))


@pytest.mark.parametrize("format", WIDTHS)
def test_what_is_read_is_what_is_stored(run: MoefyRun, format: str) -> None:
    mixture = run.convert(SAMPLES)
    nested = NestedMixture(mixture, format)
    assert torch.equal(nested.last(held(), ACTIVE), Mixture.last(mixture, held(), ACTIVE))  # nothing is rounded yet
    nested.round()
    stored = [rounded(feed, EXPERTS, format) for feed in mixture.feeds]
    for planes in range(1, nested.planes + 1):
        nested.shares[:] = 0
        nested.shares[:, planes:] = NEVER
        feeds = [read_with(layer, WIDTHS[planes - 1]) for layer in stored]
        other = Mixture(mixture.decoder, feeds, mixture.routers, mixture.pre_gate)
        np.testing.assert_allclose(nested.last(held(), ACTIVE), other.last(held(), ACTIVE), atol=1e-5)
        np.testing.assert_allclose(nested.last(held(), EXPERTS), other.last(held(), EXPERTS), atol=1e-5)
    nested.shares[:] = NEVER  # no plane: as if there were no experts
    nothing = [Feed(feed.gate, feed.up, torch.zeros_like(feed.down)) for feed in mixture.feeds]
    other = Mixture(mixture.decoder, nothing, mixture.routers, mixture.pre_gate)
    assert torch.equal(nested.last(held(), ACTIVE), other.last(held(), ACTIVE))


@pytest.mark.parametrize("format", WIDTHS)
def test_gradients_are_those_of_rounded_weights(run: MoefyRun, format: str) -> None:
    mixture = run.convert(SAMPLES)
    stored = [read_with(rounded(feed, EXPERTS, format), format) for feed in mixture.feeds]
    plain = Mixture(mixture.decoder, stored, mixture.routers, mixture.pre_gate)
    nested = NestedMixture(mixture, format)
    nested.round()
    found = list[list[Tensor]]()
    for one in (nested, plain):
        weights = [getattr(feed, name).requires_grad_(True) for feed in one.feeds for name in MATRICES]
        one.last(held(), ACTIVE).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([weight.grad.clone() for weight in weights])
    for through, right in zip(*found, strict=True):
        np.testing.assert_allclose(through, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_another_rounding_is_read_as_given(run: MoefyRun) -> None:
    mixture = run.convert(SAMPLES)
    stored = run.experts(mixture, SAMPLES, "n8")
    nested, widths = NestedMixture(mixture, "n8"), [[read_with(layer, format) for layer in stored] for format in WIDTHS]
    nested.set_rounding(widths)
    nested.shares[:, 1:] = NEVER
    other = Mixture(mixture.decoder, widths[0], mixture.routers, mixture.pre_gate)
    np.testing.assert_allclose(nested.last(held(), ACTIVE), other.last(held(), ACTIVE), atol=1e-5)
    each = expert_errors([[(one.gate, one.up, one.down) for one in layer] for layer in stored])
    np.testing.assert_allclose(nested.errors(), each, rtol=0.1)  # of all experts together, and of each


def test_shares_keep_a_batch_within_its_bits(run: MoefyRun) -> None:
    nested = NestedMixture(run.convert(SAMPLES), "n8")
    nested.round()
    read = list[float]()
    for bits in (2.5, 3.0, 6.0):
        nested.shares = nested.within(held(), ACTIVE, bits)
        with nested.recording() as recorded:
            nested.last(held(), ACTIVE)
            nested.last(held(), ACTIVE)
        assert len(recorded) == 2
        weights = recorded[0].numpy()
        assert weights.shape == (held().size, len(nested.feeds), ACTIVE)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        read.append(mean_bits(weights, nested.shares.numpy()))
        assert abs(read[-1] - bits) < 0.3  # a plane that is left out changes what the next layer's router sees
    assert read == sorted(read)


def masked(normed: NDArray[np.float32], named: NDArray[np.int64], feeds: list[Feed]) -> NDArray[np.float32]:
    total = np.zeros_like(normed)
    for token, names in enumerate(named):
        for name in names[names >= 0]:
            total[token] += feeds[name].added(torch.from_numpy(normed[token]), torch.float32).numpy()
    return total


@pytest.mark.parametrize("absent", [0.0, 0.4, 1.0])
def test_tokens_go_where_they_are_sent(absent: float) -> None:
    feeds = [Feed(*(torch.randn(*shape) for shape in ((6, 8), (6, 8), (8, 6)))) for _ in range(5)]
    normed = RNG.standard_normal((30, 8)).astype(np.float32)
    named = np.stack([RNG.permutation(4)[:3] for _ in range(30)])  # the fifth is not named
    named[RNG.random(named.shape) < absent] = -1
    asked = list[int]()

    def network(name: int) -> Feed:
        asked.append(name)
        return feeds[name]

    found = sent(torch.from_numpy(normed), torch.from_numpy(named), network, torch.float32)
    np.testing.assert_allclose(found, masked(normed, named, feeds), atol=1e-3)
    assert sorted(asked) == sorted(set(named[named >= 0].tolist()))


def test_training_goes_through_the_rounding(run: MoefyRun) -> None:
    mixture = run.convert(SAMPLES)
    judge, apart = Judge(mixture.decoder, SAMPLES, VOCAB), list[float]()
    floats = run.tune(mixture, SAMPLES, Recipe(epochs=6, batch_tokens=256, warmup=2))
    through = run.tune(mixture, SAMPLES, Recipe(epochs=6, batch_tokens=256, warmup=2, format="n2"))
    for one in (mixture, floats, through):
        nested = NestedMixture(one, "n2")
        nested.round()
        apart.append(judge.compare(nested.last(held(), ACTIVE), held())[0])
    assert apart[2] < 0.95 * min(apart[:2])


def test_it_goes_on_where_it_was_stopped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moefy_training.KEPT_STEPS % moefy_training.ROUNDED_STEPS == 0  # else it would go on with another rounding
    monkeypatch.setattr(moefy_training, "KEPT_STEPS", 6)
    monkeypatch.setattr(moefy_training, "ROUNDED_STEPS", 2)
    recipe = Recipe(epochs=2, batch_tokens=256, warmup=2, format="n8")

    def stopped(step: str, done: int) -> None:
        if step == "tuning in n8" and done == 8:
            raise KeyboardInterrupt

    whole, parts = run_in(tiny, tmp_path / "whole"), run_in(tiny, tmp_path / "parts", stopped)
    found = whole.tune(whole.convert(SAMPLES), SAMPLES, recipe)
    with pytest.raises(KeyboardInterrupt):
        parts.tune(parts.convert(SAMPLES), SAMPLES, recipe)
    done = list[int]()
    parts = run_in(tiny, tmp_path / "parts", lambda step, at: done.append(at) if step == "tuning in n8" else None)
    resumed = parts.tune(parts.convert(SAMPLES), SAMPLES, recipe)
    assert done[0] == 7
    for feed, other in zip(found.feeds, resumed.feeds, strict=True):
        assert all(torch.equal(getattr(feed, name), getattr(other, name)) for name in MATRICES)
    assert all(torch.equal(one, other) for one, other in zip(found.routers, resumed.routers, strict=True))


def test_only_nested_bits_are_trained_through() -> None:
    assert in_nested_bits("n4", epochs=1, seed=3).format == "n4"
    with pytest.raises(ModelError, match="not tuned in q8: it is not nested; choose n2, n4 or n8"):
        in_nested_bits("q8")
    for wrong in ({"epochs": -1.0}, {"bits": float("nan")}, {"learning_rate": -1e-3}):
        with pytest.raises(ModelError, match=f"{next(iter(wrong))} is .*; choose 0 or more"):
            Recipe(**wrong)  # type: ignore[arg-type]


def test_batches_are_told_apart_after_they_are_gone(run: MoefyRun) -> None:
    judge = Judge(run.decoder, SAMPLES, VOCAB)
    for at in range(8):
        (batch,) = batches(SAMPLES[at : at + 2], 10_000)
        dense = run.decoder.last(batch.tokens)[batch.there]
        assert judge.compare(dense, batch)[0] < 1e-3
