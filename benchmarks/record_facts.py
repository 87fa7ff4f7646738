"""Records what shipped exits and n-grams foresee along the model's own held-out answers, for simulations to replay.

The answers are the first of those that exits.py measures; `python benchmarks/auto.py --record` runs this.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from models import BENCH, bundle
from progress import tenths

from isthmus.apps.bench.facts import ExitFacts, Facts, guessed, write
from isthmus.edge import priors
from isthmus.split.exit_run import ExitRun, working_in
from isthmus.split.exit_samples import check_questions, divided, text_files
from isthmus.split.fetch import fetch

ASKED = 320  # as exits.py asks


def record(path: Path, layers: tuple[int, ...], count: int = 100) -> None:
    """Writes the facts of so many answers."""
    source, held = bundle("keep"), divided(text_files([fetch("texts")])).held
    with working_in(BENCH / "exits"):
        run = ExitRun(source, BENCH / "exits", tenths, os.cpu_count() or 1)
        wrote = run.answered(check_questions(held, ASKED))
        states = run.states("answers", wrote, [entry.layer for entry in source.exits])
        answers = [guessed(sample.tokens, sample.answer) for sample in wrote[:count]]
        for layer in layers:
            sha256 = source.manifest.files[source.manifest.exit(layer).file].sha256
            said = run.said(source.exit(layer), sha256, layer, states)
            for at, (answer, one) in enumerate(zip(answers, said, strict=False)):
                facts = ExitFacts(tuple(map(float, one.confidence)), tuple(map(bool, one.right)))
                answers[at] = replace(answer, exits={**answer.exits, layer: facts})
    write(Facts(priors.exits(source, layers), tuple(answers)), path)
