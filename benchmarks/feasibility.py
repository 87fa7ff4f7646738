"""Does sharing pay, before any of it is built? Acceptance of exits and n-grams, put into the published formulas.

Exits are trained on documents and on the model's own greedy answers, and measured on others of both, teacher-forced;
more quickly than those that come with isthmus, which exits.py measures.
Times are this machine's, on one thread; a slower device, a larger model in the cloud and a link are factors in the
formulas, so the map is what would be, not what was measured:

    local          s t(all layers)
    stream         f t(all layers)
    split          s t(k layers) + R + f t(the rest)
    exit           s (t(k layers) + t(exit)) + (1 - c) (R + f t(the rest)), c emitted at 5 % disagreement
    verify         (g t_d + R + f t_v(g)) / E,  E = (1 - a^(g+1)) / (1 - a)
    pipelined      a t_d + (1 - a) (R + f t_v(g) + t_d), where f t_v(g) <= g t_d
    n-grams        (R + f t_v(g)) / (tokens a round, as counted along the answers)

with s the device's slow-down, f the cloud's step relative to this model's, R the round trip, a the share of tokens that
an exit foresees, g the drafted tokens and t_d = s (t(k layers) + t(exit)).

usage: python benchmarks/feasibility.py [--documents 1000] [--answers 300] [--epochs 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
from models import BENCH, bundle
from progress import tenths
from record import Cell, Record

from isthmus.edge.drafts import NgramDrafts
from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import Part, Rows, Want
from isthmus.split.bundle import Bundle
from isthmus.split.certificate import Said
from isthmus.split.exit_scores import would_emit
from isthmus.split.exit_states import Sample, States, answers, questions, read_texts
from isthmus.split.exit_training import ExitHead, Recipe, Teacher, agreement, foresee, least_squares, train
from isthmus.split.fetch import fetch

LAYERS = [15, 20, 24, 27]
HELD = 100  # documents of each kind, and answers, that nothing is trained on
ANSWER_TOKENS = 120
CHUNK_TOKENS = 512
BLOCKS = (1, 2, 3, 4, 6, 8)
DISAGREEMENT = 0.05
ROUND_TRIPS_MS = (5, 20, 50, 100, 200)
SLOW_DOWNS, CLOUD_STEPS, HOLDS = (1, 4), (1, 8), (30, 20)


@dataclass
class Costs:
    """Milliseconds on this machine, medians.

    Attributes:
        layers: of one token through layers [0, k), by k.
        head: of the output head for one row.
        rows: of the whole model for so many rows of one sequence.
    """

    layers: dict[int, float] = field(default_factory=dict)
    head: float = 0.0
    rows: dict[int, float] = field(default_factory=dict)

    @property
    def token(self) -> float:
        """One token through the whole model."""
        return self.rows[1]


@dataclass(frozen=True)
class Exit:
    """What an exit is good for, along the model's own answers.

    Attributes:
        foresees: share of tokens at which it names the model's choice.
        emits: share of tokens that it may emit with at most DISAGREEMENT of all tokens wrong.
    """

    layer: int
    foresees: float
    emits: float


def samples(source: Bundle, part: Part, documents: int, count: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """To train on; held-out documents; held-out answers."""
    folder, tokenizer = fetch("texts"), source.tokenizer()
    kinds = [read_texts([path]) for path in sorted(folder.glob("*.jsonl"))]
    held = [text for texts in kinds for text in texts[-HELD:]]
    taught = [text for texts in kinds for text in texts[: min(documents // len(kinds), len(texts) - HELD)]]
    asked = questions(taught, count) + questions(held, HELD, seed=1)
    wrote = answers(part, tokenizer, asked, ANSWER_TOKENS, tenths("answers"))

    def chunks(texts: Sequence[str]) -> list[Sample]:
        return [Sample(tokenizer.encode(text)[:CHUNK_TOKENS]) for text in texts]

    return chunks(taught) + wrote[:-HELD], chunks(held), wrote[-HELD:]


def trained(states: States, taught: list[int], layer: int, teacher: Teacher, recipe: Recipe) -> ExitHead:
    """A head, and a word on how it goes."""
    tell = tenths(f"exit {layer}")
    return train(states, taught, layer, teacher, recipe, lambda done, total, _: tell(done, total))


def ngram_rounds(sample: Sample, block: int) -> tuple[int, int]:
    """Tokens and rounds when n-grams of the context draft and a cloud checks."""
    drafts, rest, rounds = NgramDrafts(), sample.tokens[sample.answer :], 0
    drafts.extend(sample.tokens[: sample.answer])
    while rest:
        agreed = 0
        for drafted, real in zip(drafts.draft(block), rest, strict=False):
            if drafted != real:
                break
            agreed += 1
        drafts.extend(rest[: agreed + 1])
        rest, rounds = rest[agreed + 1 :], rounds + 1
    return len(sample.tokens) - sample.answer, rounds


def measure(part: Part, turns: int = 30, context: int = 200) -> Costs:
    """Times of this machine at a context in the middle of an answer."""
    costs = Costs()
    sequence = part.open()
    tokens = list(range(100, 100 + context + max(BLOCKS) + 1))
    part.step(Rows().tokens(sequence, 0, tokens[:context], want=Want.NONE))

    def took_ms(rows: Callable[[], Rows]) -> float:
        times = []
        for _ in range(turns):
            asked = rows()
            begin = time.perf_counter()
            part.step(asked)
            times.append((time.perf_counter() - begin) * 1e3)
            sequence.truncate(context)
        return statistics.median(times)

    def along(count: int) -> Rows:
        return Rows().tokens(sequence, context, tokens[context : context + count], want_all=True)

    costs.rows = {n: took_ms(lambda n=n: along(n)) for n in (1, *(g + 1 for g in BLOCKS))}  # type: ignore[misc]
    for layer in (1, *LAYERS, part.end):
        costs.layers[layer] = took_ms(
            lambda k=layer: Rows().tokens(sequence, context, tokens[context : context + 1], leave=k, want=Want.HIDDEN)  # type: ignore[misc]
        )
    costs.head = max(0.0, costs.token - costs.layers[part.end])
    sequence.close()
    return costs


def modes(
    costs: Costs, exits: Sequence[Exit], ngrams: Mapping[int, float], trip: float, slow: float, cloud: float, held: int
) -> dict[str, float]:
    """Milliseconds a token of each mode that a device of `held` layers has."""
    found = {"stream": cloud * costs.token}
    if held == max(costs.layers):
        found["local"] = slow * costs.token
    per_layer = costs.layers[1]
    for one in (one for one in exits if one.layer <= held):
        rest = cloud * (costs.token - costs.layers[one.layer])
        drafted = slow * (costs.layers[one.layer] + per_layer + costs.head)
        choices = {
            "split": slow * costs.layers[one.layer] + trip + rest,
            "exit": drafted + (1 - one.emits) * (trip + rest),
        }
        a = one.foresees
        for g in BLOCKS:
            check = cloud * costs.rows[g + 1]
            a_round = (1 - a ** (g + 1)) / (1 - a)
            choices[f"verify, {g}"] = (g * drafted + trip + check) / a_round
            if check <= g * drafted:
                choices[f"pipelined, {g}"] = a * drafted + (1 - a) * (trip + check + drafted)
        for name, ms in choices.items():
            mode = name.partition(",")[0]
            found[mode] = min(ms, found.get(mode, ms))
    found["n-grams"] = min((trip + cloud * costs.rows[g + 1]) / ngrams[g] for g in BLOCKS)
    return found


def main() -> int:
    """Measures and writes results/feasibility.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    source = bundle("keep")
    part = open_part(source, 0, source.config.n_layers, kv=KvConfig("f16", 16384))
    taught, documents, wrote = samples(source, part, options.documents, options.answers)
    states = States(
        BENCH / "feasibility", [*taught, *documents, *wrote], LAYERS, source.config.d_model, source.model_id
    )
    states.collect(part, tenths("states"))
    part.close()
    recipe, teacher = Recipe(epochs=options.epochs), Teacher(source)
    edges = np.cumsum([0, len(taught), len(documents), len(wrote)]).tolist()
    of_taught, of_documents, of_wrote = (list(range(a, b)) for a, b in pairwise(edges))
    tokens = sum(len(sample.tokens) for sample in taught)
    record = Record(
        "feasibility",
        {**vars(options), "tokens trained on": tokens, "held-out": HELD, "d_ff": recipe.d_ff, "threads": 1},
    )

    exits: list[Exit] = []
    rows: list[list[Cell]] = []
    for layer in LAYERS:
        plain = ExitHead(source.config, 32, teacher.norm, None)
        linear = ExitHead(source.config, 32, teacher.norm, least_squares(states, of_taught, layer))
        head = trained(states, of_taught, layer, teacher, recipe)
        on_documents = [agreement(one, states, of_documents, layer, teacher) for one in (plain, linear, head)]
        foreseen = [foresee(head, states, index, layer, teacher) for index in of_wrote]
        foresees = float(np.concatenate([one.right for one in foreseen]).mean())
        exits.append(
            Exit(layer, foresees, would_emit([Said(one.confidence, one.right) for one in foreseen], DISAGREEMENT))
        )
        record.figure(f"agreement/documents/exit {layer}", on_documents[2], "share")
        record.figure(f"agreement/own answers/exit {layer}", exits[-1].foresees, "share")
        record.figure(f"emitted at 5 % disagreement/own answers/exit {layer}", exits[-1].emits, "share")
        rows.append([f"before layer {layer}", *on_documents, exits[-1].foresees, exits[-1].emits])
    record.table(
        "exits",
        ["exit", "final head alone", "linear map", "trained", "trained, own answers", "emitted at 5 % disagreement"],
        rows,
        note="Share of tokens at which the exit names the model's choice, on texts that it was not trained on.",
    )

    ngrams = {}
    for g in BLOCKS:
        made, rounds = np.sum([ngram_rounds(sample, g) for sample in wrote], axis=0)
        ngrams[g] = made / rounds
        record.figure(f"n-grams/tokens a round/{g} drafted", ngrams[g], "tokens")

    part = open_part(source, 0, source.config.n_layers, threads=1, kv=KvConfig("f16", 1024))
    costs = measure(part)
    part.close()
    for n, ms in costs.rows.items():
        record.figure(f"step/{n} rows", ms, "ms")
    for layer, ms in costs.layers.items():
        record.figure(f"step/layers [0, {layer})", ms, "ms")

    best: Counter[str] = Counter()
    names = ["stream", "local", "split", "exit", "verify", "pipelined", "n-grams"]
    table: list[list[Cell]] = []
    for held, slow, cloud, trip in product(HOLDS, SLOW_DOWNS, CLOUD_STEPS, ROUND_TRIPS_MS):
        times = modes(costs, exits, ngrams, trip, slow, cloud, held)
        first = min(times, key=times.__getitem__)
        best[first] += 1
        alone = min(times.get("local", np.inf), times["stream"])
        exact = min(ms for name, ms in times.items() if name != "exit")
        table.append(
            [held, slow, cloud, trip, *(times.get(name) for name in names), first, alone / times[first], alone / exact]
        )
    record.table(
        "map",
        ["layers held", "device slow-down", "cloud step", "round trip, ms", *names, "best", "gain", "gain, exact"],
        table,
        note="Milliseconds a token by the formulas; the gain is over the better of local and stream.",
    )
    for name in names:
        record.figure(f"best at/{name}", best[name], f"of {len(table)} points")
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
