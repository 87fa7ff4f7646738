"""Placement of experts: held against every placement of small problems, and against what is counted by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split import placement_search
from isthmus.split.placement import Place, Problem, device, workers
from isthmus.split.placement_program import bound, least_hops
from isthmus.split.placement_replay import BASELINES, baseline, replay
from isthmus.split.placement_search import balanced, place

BYTES = 1000


def random_routing(seed: int, positions: int, layers: int, experts: int, top_k: int) -> NDArray[np.int32]:
    """Experts that texts of a few topics prefer."""
    rng = np.random.default_rng(seed)
    liked = rng.gumbel(size=(3, layers, experts))[rng.integers(0, 3, positions)]
    return np.argsort(-(liked + rng.gumbel(size=liked.shape)), axis=2)[..., :top_k].astype(np.int32)


def sizes(layers: int) -> NDArray[np.int64]:
    return np.full(layers, BYTES, np.int64)


def fits(problem: Problem, found: NDArray[np.int64]) -> bool:
    """Whether a placement keeps to capacities, counts and loads."""
    for at, one in enumerate(problem.places):
        here = found == at
        if float(problem.expert_bytes @ here.sum(axis=1)) > one.capacity_bytes:
            return False
        if problem.most_of_layer is not None and here.sum(axis=1).max() > problem.most_of_layer:
            return False
        if problem.most_load is not None:
            loads = (problem.uses * here).sum(axis=1) / problem.uses.sum(axis=1)
            if (loads > problem.most_load + 1e-6).any():
                return False
    return True


def least(problem: Problem) -> float:
    """What the best of all placements costs."""
    shape = problem.layers, problem.n_experts
    every = (np.array(one).reshape(shape) for one in product(range(len(problem.places)), repeat=shape[0] * shape[1]))
    return min(replay(problem, one).cost_s for one in every if fits(problem, one))


@pytest.mark.parametrize("seed", range(6))
def test_a_devices_placement_is_the_best_of_all(seed: int) -> None:
    chosen = random_routing(seed, 30, 2, 4, 2)
    problem = device(
        chosen, 4, sizes(2), memory_bytes=(2 + seed % 3) * BYTES, flash_bytes_s=1e6, trip_s=(0.0015, 0.004)[seed % 2]
    )
    found = place(problem)
    assert found.proven and found.how == "exact" and fits(problem, found.place)
    assert found.cost_s == pytest.approx(least(problem), rel=1e-6)


def test_experts_of_different_sizes_are_a_knapsack() -> None:
    chosen = np.array([[[0], [0]], [[0], [0]], [[0], [1]], [[1], [0]]], np.int32)
    problem = device(chosen, 2, np.array([3000, 1000], np.int64), memory_bytes=3000, flash_bytes_s=1e6)
    found = place(problem)
    assert found.place.tolist() == [[1, 1], [0, 0]]  # 4 uses of 2 small ones, for 3 of a large one
    assert found.cost_s == pytest.approx(least(problem))


@pytest.mark.parametrize("seed", range(4))
def test_workers_placement_is_the_best_of_all(seed: int) -> None:
    problem = balanced(workers(random_routing(seed, 40, 3, 4, 1 + seed % 2), 4, sizes(3), 2), 0.2)
    found = place(problem)
    assert found.proven and fits(problem, found.place)
    assert found.cost_s == pytest.approx(least(problem), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_search_and_bounds_hold_where_nothing_is_solved_as_a_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the problem were too large: what is found keeps to the limits, and lies between bound and baselines."""
    monkeypatch.setattr(placement_search, "is_small", lambda problem: False)
    chosen = random_routing(seed, 60, 3, 4, 2)
    shared = balanced(workers(chosen, 4, sizes(3), 2), 0.2)
    alone = device(chosen[:, :2], 4, sizes(2), memory_bytes=3 * BYTES, flash_bytes_s=1e6, trip_s=0.0015)
    for problem in (shared, alone):
        found, best = place(problem, seed=seed), least(problem)
        assert fits(problem, found.place)
        assert bound(problem, 5) <= best + 1e-9
        assert found.bound_s <= best + 1e-9 <= found.cost_s + 2e-9
        assert found.cost_s <= 1.1 * best
        others = [one for one in (baseline(problem, name) for name in BASELINES) if fits(problem, one)]
        assert found.cost_s <= min((replay(problem, one).cost_s for one in others), default=np.inf) + 1e-9
        assert not found.proven or found.cost_s == pytest.approx(best)


def test_affinity_that_is_complete_leaves_no_hop_and_is_proven() -> None:
    """Experts of even numbers follow each other, and so do the odd ones: no token needs to pass."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 400)[:, None, None]
    chosen = (2 * np.argsort(rng.random((400, 6, 8)), axis=2)[..., :2] + kind).astype(np.int32)
    problem = balanced(workers(chosen, 16, sizes(6), 2), 0.2)
    found = place(problem)
    assert found.cost_s == pytest.approx(0, abs=1e-9) and found.proven
    assert replay(problem, baseline(problem, "contiguous")).hops > 2


def test_replay_is_what_is_counted_by_hand() -> None:
    """Two tokens, two layers, two of three experts each; memory has expert 0 of both layers, the cloud expert 2."""
    chosen = np.array([[[0, 1], [1, 2]], [[2, 0], [0, 1]]], np.int32)
    places = Place("memory"), Place("flash", use_s=1.0), Place("cloud", visit_s=10.0)
    problem = Problem(chosen, 3, sizes(2), places)
    where = np.array([[0, 1, 2], [0, 1, 2]])
    found = replay(problem, where)
    assert found.uses == (1.5, 1.5, 1.0) and found.visits == (1.5, 1.5, 1.0)
    assert found.cost_s == 1.5 * 1 + 1.0 * 10
    # Paths of the first token: 0-1, 0-2, 1-1, 1-2, of which 1-1 stays; of the second 2-0, 2-1, 0-0, 0-1: 0-0.
    assert found.hops == 0.75
    assert replay(replace(problem, hop_s=4.0), where).cost_s == 11.5 + 3.0
    # A trip serves both experts of a token that stand there.
    assert replay(problem, np.full((2, 3), 2)).cost_s == 20.0
    held = np.array([[[1, 2], [2, 1]]], np.int32)
    assert replay(problem, where, held).cost_s == 2 * (1 + 10)
    assert replay(problem, where).imbalance == 1.5  # the second layer: 1, 2, 1 of 4


def test_loads_are_bounded_and_a_skewed_layer_as_well_as_can_be() -> None:
    chosen = random_routing(1, 200, 3, 8, 2)
    problem = balanced(workers(chosen, 8, sizes(3), 2), 0.05)
    assert problem.most_load is not None and fits(problem, place(problem).place)
    assert problem.most_load.max() <= 1.05 / 2 + 0.02
    skewed = np.zeros((50, 2, 1), np.int32)  # one expert does everything
    alone = balanced(workers(skewed, 4, sizes(2), 2), 0.05)
    assert alone.most_load is not None and alone.most_load.tolist() == [1.0, 1.0]
    assert place(alone).cost_s == 0


def test_the_same_seed_gives_the_same_placement() -> None:
    chosen = random_routing(2, 300, 5, 16, 4)
    shared = balanced(workers(chosen, 16, sizes(5), 4), 0.1)
    alone = device(chosen, 16, sizes(5), memory_bytes=20 * BYTES, flash_bytes_s=1e6, trip_s=0.002)
    for problem in (shared, alone):
        first, second = place(problem, seed=7), place(problem, seed=7)
        assert (first.place == second.place).all() and first.cost_s == second.cost_s
    assert (least_hops(shared) > 0).all() and least_hops(shared).sum() <= place(shared).cost_s


def test_what_cannot_be_placed_is_refused() -> None:
    chosen = random_routing(0, 10, 2, 4, 2)
    with pytest.raises(PlanError, match=r"hold 0\.0 MB") as raised:
        device(chosen, 4, sizes(2), memory_bytes=2 * BYTES, flash_bytes_s=1e6, flash_bytes=5 * BYTES)
    assert "0.0 MB more" in raised.value.remedy
    with pytest.raises(PlanError, match="5 workers"):
        workers(chosen, 4, sizes(2), 5)
    with pytest.raises(PlanError, match="none of 3"):
        workers(chosen, 3, sizes(2), 2)
    with pytest.raises(PlanError, match="flash reads 0 MB/s"):
        device(chosen, 4, sizes(2), memory_bytes=BYTES, flash_bytes_s=0)
    with pytest.raises(PlanError, match="balance"):
        balanced(workers(chosen, 4, sizes(2), 2), -0.1)
    with pytest.raises(PlanError, match=r"routing is \(10, 2, 2\)"):
        workers(chosen, 4, sizes(3), 2)
    with pytest.raises(PlanError, match="-1"):
        Place("memory", -1)
