"""What the exits that come with isthmus are good for: how often they name the model's choice, and what they may emit.

Measured on held-out documents, and along the model's own greedy answers to 300 prompts that no exit was trained or
certified with (prompts.py). These were used for nothing else; the simulator of auto.py replays the answers to the first
100 of them.

Figures "as certified" and of "own answers" are of the calibration's 320 prompts: they show that the certificates follow
from these, which they cannot fail to do, and have no targets. So is the table of thresholds, of its questions about
texts, which no other benchmark asks: exit mode's threshold in modes.py was taken from it.

usage: python benchmarks/exits.py [--answers 300]
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np
from models import BENCH, bundle
from progress import tenths
from prompts import OTHERS, prompts
from record import Cell, Record

from isthmus.split.certificate import Said, emitted, losses
from isthmus.split.exit_run import ExitRun, working_in
from isthmus.split.exit_samples import chunks, divided, text_files
from isthmus.split.exit_scores import agreement
from isthmus.split.exit_states import CHECK_TOPICS, questions
from isthmus.split.fetch import fetch

TARGETS = {15: 0.42, 20: 0.50, 24: 0.60, 27: 0.70}  # of documents
THRESHOLDS = (0.8, 0.85, 0.9, 0.95)


def main() -> int:
    """Measures and writes results/exits.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=OTHERS, help="to prompts that no exit was certified with")
    options = parser.parse_args()
    source, held = bundle("keep"), divided(text_files([fetch("texts")])).held
    certified, others, _ = prompts()
    others = others[: options.answers]
    topical = set(questions([], len(certified) * 10, topics=CHECK_TOPICS))
    about_texts = [number for number, question in enumerate(certified) if question not in topical]
    settings = {"answers": len(others), "calibration": len(certified), "documents": len(held), "format": "keep"}
    record = Record("exits", settings)
    rows: list[list[Cell]] = []
    choices: list[list[Cell]] = []
    with working_in(BENCH / "exits"):
        run = ExitRun(source, BENCH / "exits", tenths, os.cpu_count() or 1)
        layers = [entry.layer for entry in source.exits]
        documents = run.states("documents", chunks(source.tokenizer(), held, source.config.context_length), layers)
        answers = run.states("answers", run.answered(certified), layers)
        other_answers = run.states("others", run.answered(others), layers)
        for entry in source.exits:
            exit, sha256 = source.exit(entry.layer), source.manifest.files[entry.file].sha256
            on_documents = agreement(run.said(exit, sha256, entry.layer, documents))
            said, new = (run.said(exit, sha256, entry.layer, states) for states in (answers, other_answers))
            name = f"exit {entry.layer}"
            record.figure(f"agreement/documents/{name}", on_documents, "share", target=TARGETS[entry.layer])
            record.figure(f"agreement/own answers/{name}", agreement(said), "share")
            record.figure(f"agreement/other prompts/{name}", agreement(new), "share")
            row: list[Cell] = [f"before layer {entry.layer}", entry.head_tokens or "all", on_documents, agreement(new)]
            megabytes, certificate = source.manifest.exit_bytes(entry.layer) / 1e6, entry.certificate
            if certificate is None:
                rows.append([*row, None, None, None, megabytes, None])
                continue
            record.figure(f"emitted as certified/{name}", emitted(said, certificate.threshold), "share")
            record.figure(f"disagreement as certified/{name}", _wrong(said, certificate.threshold), "share")
            share, wrong = emitted(new, certificate.threshold), _wrong(new, certificate.threshold)
            record.figure(f"emitted on other prompts/{name}", share, "share")
            record.figure(
                f"disagreement on other prompts/{name}", wrong, "share", target=certificate.disagreement, at_most=True
            )
            record.figure(f"read/{name}", megabytes, "MB a token")
            rows.append([*row, certificate.threshold, share, wrong, megabytes, megabytes / share if share else None])
            of_texts = [said[number] for number in about_texts]
            choices += [
                [f"before layer {entry.layer}", threshold, emitted(of_texts, threshold), _wrong(of_texts, threshold)]
                for threshold in THRESHOLDS
            ]
    note = f"{len(held)} held-out documents, {len(others)} answers to prompts that no exit was trained or certified "
    note += "with; thresholds as certified for at most 5 %."
    columns = ["exit", "names", "agrees, documents", "agrees, answers", "threshold", "emits", "disagrees"]
    record.table("exits", [*columns, "MB a token", "MB an emitted one"], rows, note=note)
    note = f"{len(about_texts)} answers to the calibration's questions about held-out texts."
    record.table("thresholds", ["exit", "threshold", "emits", "disagrees"], choices, note=note)
    record.write()
    return 0


def _wrong(said: list[Said], threshold: float) -> float:
    """The mean share of an answer that is emitted and not the model's choice."""
    return float(np.mean(losses(said, threshold)))


if __name__ == "__main__":
    sys.exit(main())
