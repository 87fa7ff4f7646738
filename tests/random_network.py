"""Random networks to cut, and every way to cut a small one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from isthmus.split.budget import LATENCY, taken
from isthmus.split.cut import INPUT, Cut, Flow, Network, Shared, Use, priced


def random_network(chance: random.Random, tasks: int, tiers: int, anywhere: bool = False) -> Network:
    """With tensors that several tasks use, some free, some dear; two resources, of one of which tasks share some.

    Args:
        anywhere: whether all tasks run on every tier and all tensors travel; else some do not.
    """
    users: dict[int, list[int]] = {at: [] for at in range(INPUT, tasks)}
    narrow = chance.choice([0.4, 0.7, 1.2])
    for task in range(tasks):
        near = [at for at in range(INPUT, task) if chance.random() < narrow / (task - at)]
        for at in near or [chance.randrange(INPUT, task) if task else INPUT]:
            users[at].append(task)
    flows = []
    for at, all_users in users.items():
        parts = [all_users]
        if len(all_users) > 1 and chance.random() < 0.3:  # two tensors of one task
            middle = chance.randrange(1, len(all_users))
            parts = [all_users[:middle], all_users[middle:]]
        for part in parts:
            dear = [0.0, 5 * chance.random(), 30 * chance.random()]
            wire_ms = tuple(
                np.inf if not anywhere and chance.random() < 0.03 else chance.choice(dear) for _ in range(tiers - 1)
            )
            flows.append(Flow(at, tuple(part), wire_ms))
    base = np.array([10 * chance.random() for _ in range(tasks)])
    ms = np.stack([base * 4.0**-tier * [chance.uniform(0.5, 2) for _ in range(tasks)] for tier in range(tiers)])
    back = np.array([chance.choice([0.0, 0.0, 0.5, 1.0]) for _ in range(tasks)]) * ms[1:].min(axis=0, initial=99.0)
    memory = np.zeros_like(ms)
    memory[0] = [9 * chance.random() for _ in range(tasks)]
    energy = np.zeros_like(ms)
    energy[0] = 3 * ms[0]
    for task in range(tasks):
        if not anywhere and chance.random() < 0.05:
            ms[chance.randrange(tiers), task] = np.inf
    links = np.ones(tiers - 1)
    shared = []
    for _ in range(chance.randrange(3) if tasks > 1 else 0):
        needing = chance.sample(range(tasks), chance.randrange(2, min(tasks, 4) + 1))
        shared.append(Shared(tuple(needing), 12 * chance.random()))
    use = {"memory": Use(memory, 0 * links, tuple(shared)), "energy": Use(energy, links)}
    trips = tuple(chance.choice([0.0, 2.0, 10.0]) for _ in links)
    waits = tuple(trip * chance.choice([0.0, 0.5, 1.0]) for trip in trips)
    return Network(ms, tuple(flows), trips, use, waits, back)


def random_budgets(chance: random.Random, cuts: Sequence[Cut]) -> dict[str, float]:
    """Some of what a way to share may take: about what one of the better half takes, a little more or less."""
    budgets = {}
    for name in chance.sample([LATENCY, "memory", "energy"], chance.randrange(4)) if cuts else ():
        amounts = sorted(taken(cut, name) for cut in cuts)
        budgets[name] = amounts[int(len(amounts) * chance.random() / 2)] * chance.choice([1.001, 0.97])
    return budgets


def every_cut(network: Network) -> Iterator[Cut]:
    """All ways to share a network in which each task runs where it can, and each tensor gets where it must."""
    before: list[list[int]] = [[] for _ in range(network.tasks)]
    for flow in network.flows:
        for user in flow.consumers:
            if flow.producer != INPUT:
                before[user].append(flow.producer)

    def go_on(tiers: list[int]) -> Iterator[Cut]:
        task = len(tiers)
        if task == network.tasks:
            cut = priced(network, tiers)
            if np.isfinite(cut.ms):
                yield cut
            return
        for tier in range(max((tiers[at] for at in before[task]), default=0), network.tiers):
            if np.isfinite(network.ms[tier, task]):
                yield from go_on([*tiers, tier])

    yield from go_on([])
