"""Eviction over recorded routing: known hit rates, and what the engine's own store counts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.edge.experts.policy import POLICIES
from isthmus.edge.experts.simulate import foresight, hit_rate, simulate
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import DeviceError, EngineError
from tests.native_tools import run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record_bytes, stored


def routed(chosen: NDArray[np.int32]) -> Routing:
    return Routing(chosen, np.full(chosen.shape, 0.5, np.float32), chosen)


def test_a_loop_that_is_too_long_is_what_lru_cannot_hold() -> None:
    """Five experts in turn and room for four: least recently used always errs, Belady's choice keeps three of four."""
    turns = routed((np.arange(400) % 5).astype(np.int32)[:, None, None])
    assert hit_rate(turns, 5, 4, "lru", warm=20) == 0
    assert hit_rate(turns, 5, 4, "belady", warm=20) == pytest.approx(0.75, abs=0.01)
    assert hit_rate(turns, 5, 5, "lru", warm=20) == 1


def test_belady_is_never_beaten() -> None:
    rng = np.random.default_rng(0)
    for seed, capacity in product(range(3), (8, 12, 20)):
        weights = np.random.default_rng(seed).dirichlet(np.full(8, 0.5), 3)
        chosen = np.array(
            [[rng.choice(8, 2, replace=False, p=p * 0.9 + 0.1 / 8) for p in weights] for _ in range(150)], np.int32
        )
        rates = {policy: hit_rate(routed(chosen), 8, capacity, policy) for policy in (*POLICIES, "belady")}
        assert rates["belady"] >= max(rates[policy] for policy in POLICIES), rates


def test_foresight_counts_from_the_second_layer_on() -> None:
    chosen = np.array([[[0, 1], [2, 3], [4, 5]]], np.int32)
    foreseen = np.array([[[7, 7], [3, 6], [5, 4]]], np.int32)
    assert foresight(Routing(chosen, np.ones(chosen.shape, np.float32), foreseen)) == 0.75
    with pytest.raises(EngineError, match="different shapes"):
        Routing(chosen, np.ones((1, 3, 3), np.float32), foreseen)


def test_layers_share_a_budget_that_is_never_exceeded() -> None:
    rng = np.random.default_rng(5)
    chosen = np.array([[rng.choice(8, 2, replace=False) for _ in range(3)] for _ in range(60)], np.int32)
    found = simulate(routed(chosen), 8, 90, "lfru", sizes=[10, 20, 5])
    taken = (found.resident.sum(axis=2) * [10, 20, 5]).sum(axis=1)
    assert taken.max() <= 90 < taken.max() + 20
    assert found.by_layer(10).mean() == pytest.approx(found.hit_rate(10))
    last = np.take_along_axis(found.resident, chosen.astype(np.int64), axis=2)[:, -1]
    assert last.all()  # what the last layer took is there


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(DeviceError, match=r"a capacity of 1 experts.*at least the 2"):
        simulate(routed(np.array([[[0, 1]]], np.int32)), 4, 1, "lru")
    with pytest.raises(DeviceError, match="the eviction policy is 'none'"):
        simulate(routed(np.array([[[0, 1]]], np.int32)), 4, 4, "none")


@pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
@pytest.mark.parametrize("policy", POLICIES)
def test_the_engines_store_does_what_is_simulated(tmp_path: Path, policy: str) -> None:
    """With planes of one size and no reading ahead, hits are the same but where planes are worth the same."""
    rng = np.random.default_rng(3)
    weights = rng.dirichlet(np.full(8, 0.7), 3)
    chosen = np.array([[rng.choice(8, 2, replace=False, p=p) for p in weights] for _ in range(200)], np.int32)
    routing, text = routed(chosen), some_tokens(200)
    bundle = stored(RandomModel("q4", random_config(experts=ExpertsConfig(8, 2, 40))), tmp_path / "bundle")
    with paged(bundle, 10 * record_bytes(bundle), policy=policy, foresee=False) as (part, store):
        part.replay(routing)
        run_tokens(part, part.open(), text, [1] * 200)
        layers = [store.tables.layer(i).report() for i in range(3)]
    found = 1 - sum(layer["missed"][0] for layer in layers) / sum(layer["taken"][0] for layer in layers)
    assert found == pytest.approx(hit_rate(routing, 8, 10, policy), abs=0.03)
    if policy != "lfru":  # whose worth the engine keeps in half the digits
        simulated = simulate(routing, 8, 10, policy).hits
        assert [layer["missed"][0] for layer in layers] == (~simulated).sum(axis=(0, 2)).tolist()
