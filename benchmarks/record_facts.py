"""Records what exits and n-grams foresee along the model's own held-out answers, for simulations to replay.

The samples, states and recipe are those of feasibility.py; `python benchmarks/auto.py --record` runs this.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from feasibility import LAYERS, samples, trained
from models import BENCH, bundle
from progress import tenths

from isthmus.apps.bench.facts import ExitFacts, guessed, write
from isthmus.engine import KvConfig, open_part
from isthmus.split.exit_states import States
from isthmus.split.exit_training import Recipe, Teacher, foresee


def record(path: Path, layers: tuple[int, ...], epochs: int, documents: int = 1000, asked: int = 300) -> None:
    """Writes the facts of every held-out answer."""
    source = bundle("keep")
    part = open_part(source, 0, source.config.n_layers, kv=KvConfig("f16", 16384))
    taught, held, wrote = samples(source, part, documents, asked)
    states = States(BENCH / "feasibility", [*taught, *held, *wrote], LAYERS, source.config.d_model, source.model_id)
    states.collect(part, tenths("states"))
    part.close()
    teacher, first = Teacher(source), len(taught) + len(held)
    answers = [guessed(sample.tokens, sample.answer) for sample in wrote]
    for layer in layers:
        head = trained(states, list(range(len(taught))), layer, teacher, Recipe(epochs=epochs))
        for i, answer in enumerate(answers):
            seen = foresee(head, states, first + i, layer, teacher)
            # The last state foresees what comes after the answer, which nobody knows.
            confidence, right = seen.confidence[: answer.tokens], seen.right[: answer.tokens]
            facts = ExitFacts(tuple(map(float, confidence)), tuple(map(bool, right)))
            answers[i] = replace(answer, exits={**answer.exits, layer: facts})
    write(answers, path)
