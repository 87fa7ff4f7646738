"""Records what shipped exits and n-grams foresee along the model's own held-out answers, for simulations to replay.

The answers are the first of those to prompts that no exit was trained or certified with (prompts.py), as exits.py
measures them; `python benchmarks/auto.py --record` runs this.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from models import BENCH, bundle
from progress import tenths
from prompts import prompts

from isthmus.apps.bench.facts import ExitFacts, Facts, guessed, write
from isthmus.edge import priors
from isthmus.split.exit_run import ExitRun, working_in


def record(path: Path, count: int = 100) -> None:
    """Writes what all exits that ship foresee of so many answers."""
    source = bundle("keep")
    layers = [entry.layer for entry in source.exits]
    with working_in(BENCH / "exits"):
        run = ExitRun(source, BENCH / "exits", tenths, os.cpu_count() or 1)
        wrote = run.answered(prompts().others)
        states = run.states("others", wrote, layers)
        answers = [guessed(sample.tokens, sample.answer) for sample in wrote[:count]]
        for layer in layers:
            sha256 = source.manifest.files[source.manifest.exit(layer).file].sha256
            said = run.said(source.exit(layer), sha256, layer, states)
            for at, (answer, one) in enumerate(zip(answers, said, strict=False)):
                facts = ExitFacts(tuple(map(float, one.confidence)), tuple(map(bool, one.right)))
                answers[at] = replace(answer, exits={**answer.exits, layer: facts})
    vocabulary = source.config.vocab_size
    heads = {entry.layer: (entry.head_tokens or vocabulary) / vocabulary for entry in source.exits}
    write(Facts(priors.exits(source, layers), tuple(answers), heads), path)
