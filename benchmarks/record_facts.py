"""Records what shipped exits and n-grams foresee along the model's own held-out answers, for simulations to replay.

The answers are the first of those to prompts that no exit was trained or certified with (prompts.py), as exits.py
measures them; `python benchmarks/auto.py --record` runs this.
"""

from __future__ import annotations

import os
from pathlib import Path

from models import BENCH, bundle
from progress import tenths
from prompts import prompts

from isthmus.apps.bench.facts import Facts, write
from isthmus.apps.cli.foreseen import foreseen
from isthmus.edge import priors
from isthmus.split.exit_run import ExitRun, working_in


def record(path: Path, count: int = 100) -> None:
    """Writes what all exits that ship foresee of so many answers."""
    source = bundle("keep")
    with working_in(BENCH / "exits"):
        run = ExitRun(source, BENCH / "exits", tenths, os.cpu_count() or 1)
        answers = foreseen(run, prompts().others, "others").answers[:count]
    vocabulary = source.config.vocab_size
    heads = {entry.layer: (entry.head_tokens or vocabulary) / vocabulary for entry in source.exits}
    exits = priors.exits(source, [entry.layer for entry in source.exits])
    write(Facts(exits, answers, heads), path)
