"""The best cut is the best of all cuts, with and without budgets, for one input and for a pipeline."""

from __future__ import annotations

import random
from typing import Any, get_args

import numpy as np
import pytest

from isthmus.protocol.errors import PlanError
from isthmus.split.budget import LATENCY, Aim, best, taken
from isthmus.split.cut import INPUT, Cut, Flow, Network, Use, fastest, priced
from tests.random_network import every_cut, random_budgets, random_network

NEAR = 1e-6


def value(cut: Cut, aim: str) -> float:
    return cut.ms if aim == "latency" else cut.slowest_ms


@pytest.mark.parametrize("seed", range(60))
def test_the_fastest_of_all_cuts(seed: int) -> None:
    chance = random.Random(seed)
    tiers = chance.choice([1, 2, 2, 3])
    network = random_network(chance, chance.randrange(0, 12 if tiers == 3 else 17), tiers)
    least = min((cut.ms for cut in every_cut(network)), default=None)
    if least is None:
        with pytest.raises(PlanError, match=r"runs on no machine|what another needs"):
            fastest(network)
    else:
        assert fastest(network).ms == pytest.approx(least, rel=NEAR, abs=1e-9)


@pytest.mark.parametrize("aim", get_args(Aim))
@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_cuts_within_budgets(seed: int, aim: Aim) -> None:
    chance = random.Random(seed)
    tiers = chance.choice([2, 2, 3])
    network = random_network(chance, chance.randrange(1, 10 if tiers == 3 else 13), tiers)
    cuts = list(every_cut(network))
    budgets = random_budgets(chance, cuts)
    allowed = [cut for cut in cuts if all(taken(cut, name) <= most for name, most in budgets.items())]
    if not allowed:
        with pytest.raises(PlanError):
            best(network, aim, budgets)
        return
    found = best(network, aim, budgets)
    assert value(found, aim) == pytest.approx(min(value(cut, aim) for cut in allowed), rel=NEAR, abs=1e-9)
    assert all(taken(found, name) <= most * (1 + NEAR) + 1e-9 for name, most in budgets.items())


def chain(*ms: float, wire_ms: float = 1.0, trip_ms: float = 0.0, factor: float = 0.1) -> Network:
    """Tasks one after the other, which a cloud runs in a tenth of the time."""
    device = np.array(ms)
    flows = [Flow(at, (at + 1,), (wire_ms,)) for at in range(INPUT, len(ms) - 1)]
    return Network(np.stack([device, factor * device]), tuple(flows), (trip_ms,))


def test_a_tensor_that_two_tasks_use_travels_once() -> None:
    ms = np.array([[1.0, 9.0, 9.0], [9.0, 1.0, 1.0]])
    network = Network(ms, (Flow(INPUT, (0,), (50.0,)), Flow(0, (1, 2), (4.0,))), (0.0,))
    found = fastest(network)
    assert (found.tiers, found.ms, found.links) == ((0, 1, 1), 7.0, (4.0,))


def test_sharing_that_does_not_pay_is_not_advised() -> None:
    assert fastest(chain(5.0, 5.0, trip_ms=10.0)).tiers == (0, 0)
    assert fastest(chain(5.0, 5.0, trip_ms=7.0)).tiers == (1, 1)
    assert fastest(Network(np.zeros((2, 0)), (), (3.0,))).ms == 0.0


def test_a_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    network = chain(4.0, 4.0, 4.0, 4.0, wire_ms=0.5, factor=1.0)
    assert fastest(network).tiers == (0, 0, 0, 0)
    found = best(network, "throughput")
    assert found.tiers == (0, 0, 1, 1) and found.slowest_ms == 8.0 and found.ms == 16.5


def test_a_pipeline_does_not_wait_for_the_round_trip() -> None:
    base = chain(40.0, 40.0, wire_ms=5.0, trip_ms=102.0, factor=1.0)
    assert best(base, "throughput").tiers == (0, 0)  # all of it keeps the link busy
    network = Network(base.ms, base.flows, base.trip_ms, wait_ms=(100.0,))
    found = best(network, "throughput")
    assert found.tiers == (0, 1) and found.slowest_ms == 40.0 and found.links == (107.0,) and found.ms == 187.0
    assert priced(network, (1, 1)).slowest_ms == 80.0 and fastest(network).tiers == (0, 0)
    with pytest.raises(PlanError, match="waits for longer than its trip"):
        Network(base.ms, base.flows, base.trip_ms, wait_ms=(103.0,))


def test_a_pipeline_works_on_while_answers_travel_back() -> None:
    base = chain(60.0, 50.0, wire_ms=5.0, factor=1.0)
    ms = base.ms.copy()
    ms[1, 1] += 50.0  # the way back of the last task's
    network = Network(ms, base.flows, base.trip_ms, back_ms=np.array([0.0, 50.0]))
    assert priced(network, (0, 1)).slowest_ms == 60.0 and best(network, "throughput").tiers == (0, 1)
    assert priced(Network(ms, base.flows, base.trip_ms), (0, 1)).slowest_ms == 100.0
    assert priced(network, (1, 1)).backs == (0.0, 50.0) and priced(network, (1, 1)).slowest_ms == 110.0
    assert fastest(network).ms == fastest(Network(ms, base.flows, base.trip_ms)).ms
    for back in ([0.0, 101.0], [-1.0, 0.0], [0.0]):
        with pytest.raises(PlanError, match="longer than the task"):
            Network(ms, base.flows, base.trip_ms, back_ms=np.array(back))


@pytest.mark.parametrize("seed", range(8))
def test_wires_that_take_for_ever_cost_no_precision(seed: int) -> None:
    chance = random.Random(seed)
    free = random_network(chance, 9, 2, anywhere=True)
    flows = tuple(
        Flow(one.producer, one.consumers, (one.ms[0] if at % 3 else 1e9,)) for at, one in enumerate(free.flows)
    )
    network = Network(free.ms, flows, free.trip_ms)
    assert fastest(network).ms == pytest.approx(min(cut.ms for cut in every_cut(network)), rel=1e-6)


def test_a_task_larger_than_the_budget_does_not_blur_it() -> None:
    base = chain(1.0, 1.0, 1.0, wire_ms=0.1)
    memory = np.array([[0.6, 0.6, 1e4], [0.0, 0.0, 0.0]])  # two of them are a fifth more than there may be
    network = Network(base.ms, base.flows, base.trip_ms, {"memory_mb": Use(memory, np.zeros(1))})
    found = best(network, budgets={"memory_mb": 1.0})
    assert found.use["memory_mb"] <= 1.0 and found.ms == min(
        cut.ms for cut in every_cut(network) if cut.use["memory_mb"] <= 1.0
    )


@pytest.mark.parametrize("aim", get_args(Aim))
def test_a_budget_of_nothing_leaves_all_to_the_cloud(aim: Aim) -> None:
    chance = random.Random(0)
    for _ in range(20):  # whose sums rounding leaves a little of
        base = chain(*(10 * chance.random() for _ in range(12)))
        memory = np.array([[9 * chance.random() for _ in range(12)], [0.0] * 12])
        network = Network(base.ms, base.flows, base.trip_ms, {"memory_mb": Use(memory, np.zeros(1))})
        assert set(best(network, aim, {"memory_mb": 0.0}).tiers) == {1}


def test_a_search_that_was_ended_says_that_nothing_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    whole = scipy.optimize.milp

    def ended(*args: Any, **named: Any) -> Any:
        found = whole(*args, **named)
        found.status = 1
        return found

    network = chain(4.0, 4.0, 4.0, 4.0, wire_ms=0.5, factor=1.0)
    assert best(network, "throughput").proven
    monkeypatch.setattr(scipy.optimize, "milp", ended)
    found = best(network, "throughput")
    assert found.slowest_ms == 8.0 and not found.proven


def test_budgets_that_cannot_be_met_say_which_and_by_how_much() -> None:
    base = chain(4.0, 4.0, wire_ms=20.0)
    memory = np.array([[3.0, 5.0], [0.0, 0.0]])
    network = Network(base.ms, base.flows, base.trip_ms, {"memory_mb": Use(memory, np.zeros(1))})
    assert best(network, budgets={"memory_mb": 8.0}).tiers == (0, 0)
    assert best(network, budgets={"memory_mb": 7.9}).tiers == (1, 1)
    with pytest.raises(PlanError, match=r"^ms 5 cannot be met: 8 is the least, 3 more; raise that budget$"):
        best(network, budgets={LATENCY: 5.0})
    with pytest.raises(PlanError, match="memory_mb 7 and ms 9 can each be met, but not together"):
        best(network, budgets={"memory_mb": 7.0, LATENCY: 9.0})
    with pytest.raises(PlanError, match="nothing is known of power; budget one of: ms, memory_mb"):
        best(network, budgets={"power": 1.0})


@pytest.mark.parametrize(
    ("ms", "flow", "trip", "said"),
    [
        ([[np.nan]], Flow(INPUT, (0,), ()), (), "not a number from 0 on"),
        ([[-1.0]], Flow(INPUT, (0,), ()), (), "not a number from 0 on"),
        ([[1.0], [1.0]], Flow(INPUT, (0,), (1.0,)), (), "0 links between 2 machines"),
        ([[1.0], [1.0]], Flow(INPUT, (0,), (1.0, 2.0)), (1.0,), "for each link"),
        ([[1.0], [1.0]], Flow(0, (0,), (1.0,)), (1.0,), "used before it is made"),
        ([[1.0], [1.0]], Flow(-2, (0,), (1.0,)), (1.0,), "used before it is made"),
        ([[1.0], [1.0]], Flow(INPUT, (1,), (1.0,)), (1.0,), "used before it is made"),
    ],
)
def test_what_is_no_network_is_refused(ms: list[list[float]], flow: Flow, trip: tuple[float, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Network(np.array(ms), (flow,), trip)


def test_data_do_not_travel_back() -> None:
    with pytest.raises(PlanError, match="travel back"):
        priced(chain(1.0, 1.0), (1, 0))
