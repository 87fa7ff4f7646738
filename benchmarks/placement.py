"""Where experts should stand: over workers, and over a device's memory and flash; and what that is worth held out.

The routing is that of SmolLM2 as `isthmus moefy --experts 64 --active 8` converts it, along documents that it was not
made with: the first half places, the second is replayed. Small random problems are held against every placement.

usage: python benchmarks/placement.py [--tokens 3000] [--problems 60] [--bundle DIR]
"""

from __future__ import annotations

import argparse
import random
import statistics
from itertools import product
from pathlib import Path

import numpy as np
from experts import converted, say
from numpy.typing import NDArray
from record import Cell, Record

from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.simulate import hit_rate
from isthmus.edge.experts.store import ExpertStore
from isthmus.edge.experts.warm import warm
from isthmus.engine import KvConfig
from isthmus.engine.native_part import open_native
from isthmus.engine.part import Rows
from isthmus.engine.placement import Placement
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle
from isthmus.split.exit_samples import divided, text_files
from isthmus.split.exit_states import CHECK_TOPICS, questions
from isthmus.split.fetch import fetch
from isthmus.split.placement import Placed, Problem, device, workers
from isthmus.split.placement_replay import baseline, replay
from isthmus.split.placement_report import figures, halves, kept
from isthmus.split.placement_search import balanced, place
from isthmus.split.placement_trace import checked, expert_bytes, recorded

WORKERS, SHARES, BALANCE = (2, 4), (0.125, 0.25, 0.5), 0.1
POLICIES = ("lru", "lfru", "belady")
FLASH_BYTES_S, READ_S = 200e6, 1e-4
QUESTIONS, FIRST = 6, 32
NEAR = 1e-6


def main() -> None:
    """Measures and writes results/placement.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="of which half are held out")
    parser.add_argument("--problems", type=int, default=60, help="small random ones")
    parser.add_argument("--bundle", type=Path, help="a mixture other than the usual one")
    asked = parser.parse_args()
    record = Record("placement", {"tokens": asked.tokens, "problems": asked.problems, "threads": 1})
    exact(record, asked.problems)
    bundle = Bundle.open(asked.bundle) if asked.bundle else converted()
    experts = bundle.config.experts
    assert experts is not None
    say("recording routing")
    held = divided(text_files([fetch("texts")])).held
    chosen = checked(bundle, recorded(bundle, held, asked.tokens, threads=1))
    shared(record, bundle, chosen, experts.n_experts)
    alone(record, bundle, chosen, experts.n_experts)
    record.write()


def exact(record: Record, count: int) -> None:
    """Small random problems of both kinds, against every placement."""
    say("small problems")
    proven, wrong, took = 0, 0, list[float]()
    for seed in range(count):
        problem = small(random.Random(seed))
        found = place(problem, seed=seed)
        took.append(found.seconds)
        proven += found.proven
        wrong += abs(found.cost_s - best_of_all(problem)) > NEAR * found.cost_s + 1e-12
    record.figure("small/other than the best of all", wrong, "problems", target=0, at_most=True)
    record.figure("small/proven", proven / count, "of problems", target=1.0)
    record.figure("small/longest", max(took), "s")


def small(chance: random.Random) -> Problem:
    """A problem with at most 6,561 placements."""
    rng = np.random.default_rng(chance.randrange(1 << 30))
    layers, n, top_k = chance.choice([(2, 4, 1), (2, 4, 2), (3, 4, 2)])
    liked = rng.gumbel(size=(3, layers, n))[rng.integers(0, 3, 40)]
    chosen = np.argsort(-(liked + rng.gumbel(size=liked.shape)), axis=2)[..., :top_k].astype(np.int32)
    sizes = np.full(layers, 1000, np.int64)
    if layers == 3 or chance.random() < 0.5:
        return workers(chosen, n, sizes, 2)
    trip = chance.choice([0.001, 0.002, 0.004])
    room = 1000 * chance.randrange(1, layers * n)
    return device(chosen, n, sizes, memory_bytes=room, flash_bytes_s=1e6, trip_s=trip)


def best_of_all(problem: Problem) -> float:
    """What the best of all placements costs."""
    shape, best = (problem.layers, problem.n_experts), np.inf
    for one in product(range(len(problem.places)), repeat=shape[0] * shape[1]):
        found = np.array(one).reshape(shape)
        held = [float(problem.expert_bytes @ (found == p).sum(axis=1)) for p in range(len(problem.places))]
        counts = [int((found == p).sum(axis=1).max()) for p in range(len(problem.places))]
        if max(counts) > (problem.most_of_layer or problem.n_experts):
            continue
        if all(size <= where.capacity_bytes for size, where in zip(held, problem.places, strict=True)):
            best = min(best, replay(problem, found).cost_s)
    return best


def shared(record: Record, bundle: Bundle, chosen: NDArray[np.int32], n_experts: int) -> None:
    """Workers of a cloud."""
    along, held = halves(chosen)
    rows = list[list[Cell]]()
    for count in WORKERS:
        say(f"{count} workers")
        problem = balanced(workers(along, n_experts, expert_bytes(bundle), count), BALANCE)
        found = place(problem)
        ways = {name: baseline(problem, name) for name in ("contiguous", "random", "frequency")} | {"ours": found.place}
        for name, where in ways.items():
            first, behind = replay(problem, where), replay(problem, where, held)
            record.figure(f"hops/{count}/{name}", behind.hops, "a held-out token")
            rows.append([count, name, first.hops, behind.hops, behind.imbalance])
        key = f"hops/{count}"
        ours = replay(problem, found.place, held).hops
        record.figure(f"{key}/fewer", ours, "a held-out token", target=1.0, of=f"{key}/contiguous", at_most=True)
        record.figure(f"{key}/least", found.bound_s, "a token, no placement has less")
        record.figure(f"{key}/gap", found.gap, "of the cost")
        record.figure(f"{key}/solved in", found.seconds, "s")
    note = (
        f"Passages between workers of a token's paths through {chosen.shape[1]} layers, and uses of the fullest worker "
        f"over the mean in the worst layer, held out; ours is bounded to {1 + BALANCE:g} along the text that placed it."
    )
    record.table("workers", ["workers", "placement", "hops", "hops held out", "fullest worker"], rows, note=note)


def alone(record: Record, bundle: Bundle, chosen: NDArray[np.int32], n_experts: int) -> None:
    """A device that reads from flash: placed once, against policies that begin with what the first half left."""
    along, held = halves(chosen)
    sizes, layers = expert_bytes(bundle), np.arange(chosen.shape[1])[:, None]
    routing = Routing(chosen, np.ones(chosen.shape, np.float32), chosen)
    a_token = chosen.shape[1] * chosen.shape[2]
    hits, starts = list[list[Cell]](), list[list[Cell]]()
    for share in SHARES:
        say(f"memory for {share:.1%}")
        capacity = int(share * n_experts * chosen.shape[1])
        room = float(capacity * sizes.mean())
        problem = device(along, n_experts, sizes, memory_bytes=room, flash_bytes_s=FLASH_BYTES_S, flash_read_s=READ_S)
        found = place(problem)
        rates = {"placed": float((found.place[layers, held] == 0).mean())}
        rates |= {p: hit_rate(routing, n_experts, capacity, p, warm=len(along)) for p in POLICIES}
        miss_ms = 1e3 * problem.places[1].use_s
        for name, rate in rates.items():
            record.figure(f"hits/{share:g}/{name}", rate, "of held-out experts")
            record.figure(f"reading/{share:g}/{name}", (1 - rate) * a_token * miss_ms, "ms a held-out token")
        record.figure(f"solved in/{share:g}", found.seconds, "s")
        record.figure(f"gap/{share:g}", found.gap, "of the cost", target=NEAR, at_most=True)
        hits.append([f"{share:.1%}", *rates.values()])
        starts += [[f"{share:.1%}", *row] for row in beginnings(record, bundle, problem, found, share)]
    note = "Share of held-out experts in memory. Placed: by the first half, and never changed."
    record.table("hits", ["memory", "placed", "LRU", "LFRU", "Belady"], hits, note=note)
    note = (
        f"Planes that were not in memory when a layer took them, LFRU with reading ahead: of {QUESTIONS} questions and "
        f"of the first {FIRST} tokens after each, mean; and what was read before the question, in MB."
    )
    columns = ["memory", "begins with", "missed in the question", f"in {FIRST} tokens", "MB read before"]
    record.table("beginnings", columns, starts, note=note)


def beginnings(record: Record, bundle: Bundle, problem: Problem, found: Placed, share: float) -> list[list[Cell]]:
    """Misses of a device that begins with nothing, and of one that begins with the placement's experts of memory."""
    placement = kept(bundle, problem, found, figures(problem, found, [], 0))
    template, rows = bundle.tokenizer(), list[list[Cell]]()
    asked = [
        template.encode(f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n")
        for one in questions([], QUESTIONS, seed=1, topics=CHECK_TOPICS)
    ]
    for name, plan in (("nothing", None), ("placement", placement)):
        told = [begun(bundle, int(problem.places[0].capacity_bytes), plan, tokens) for tokens in asked]
        means = [statistics.mean(one) for one in zip(*told, strict=True)]
        record.figure(f"missed/{share:g}/{name}", means[0] + means[1], f"planes until token {FIRST}")
        rows.append([name, *means])
    record.figure(
        f"missed/{share:g}/warm", float(rows[1][1] or 0) + float(rows[1][2] or 0), f"planes until token {FIRST}",
        target=1.0, of=f"missed/{share:g}/nothing", at_most=True,
    )  # fmt: skip
    return rows


def begun(bundle: Bundle, budget: int, plan: Placement | None, tokens: list[int]) -> tuple[float, float, float]:
    """Planes missed in a question, and in the first tokens after it; MB read before."""
    store = ExpertStore(bundle, budget)
    kv = KvConfig(max_tokens=len(tokens) + FIRST + 32)
    part = open_native(bundle.without_experts(), 0, bundle.config.n_layers, kv=kv, experts=store, threads=1)
    if plan is not None:
        warm(part, store, plan)
    before, sequence = ExpertReport.of(store).read_bytes, part.open()
    token, seen = part.step(Rows().tokens(sequence, 0, tokens)).tokens[0], [missed(store)]
    for at in range(FIRST):
        token = part.step(Rows().tokens(sequence, len(tokens) + at, [token])).tokens[0]
    seen.append(missed(store))
    part.close()
    store.close()
    return seen[0], seen[1] - seen[0], before / 1e6


def missed(store: ExpertStore) -> int:
    """Planes so far."""
    report = ExpertReport.of(store)
    return sum(report.taken) - sum(report.in_memory)


if __name__ == "__main__":
    main()
