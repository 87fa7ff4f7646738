"""Prompts to SmolLM2's exits: those that they were certified with, others by which they are judged, and some kept back.

The others are of the same two kinds, half about topics and half about texts. Neither the calibration nor verify.py asks
one of them, and their texts are documents that the exits were neither trained nor certified with. Those kept back, all
about topics, are for modes.py, whose settings were chosen on the first of them: it asks those behind. Topics come
again, in other questions: there are 45.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from isthmus.split.exit_samples import check_questions, divided, text_files
from isthmus.split.exit_states import CHECK_TOPICS, MAX_QUOTED_CHARS, questions
from isthmus.split.fetch import fetch

CERTIFIED = 320  # as `isthmus exits calibrate` asks
TAUGHT = 1000  # documents, as `isthmus exits train` takes
ELSEWHERE = 200  # about topics, as verify.py asks
SEEN = 24  # of those, by modes.py when its threshold was taken
OTHERS = 300
ENOUGH = 10_000  # questions: more than there are


class Prompts(NamedTuple):
    """See the module."""

    certified: list[str]
    others: list[str]
    kept_back: list[str]


def prompts(texts: list[Path] | None = None) -> Prompts:
    """All three kinds.

    Args:
        texts: files; by default those that the exits were trained and certified with.

    Raises:
        ModelError: a file cannot be read.
    """
    files = text_files(texts or [fetch("texts")])
    every, taught = divided(files), divided(files, TAUGHT).taught
    certified = check_questions(every.held, CERTIFIED)
    known = {text[:MAX_QUOTED_CHARS] for text in (*taught, *every.held)}
    new = [text for text in every.taught if text[:MAX_QUOTED_CHARS] not in known]
    elsewhere = questions([], ELSEWHERE, topics=CHECK_TOPICS)
    asked = {*certified, *elsewhere}
    about = [question for question in check_questions([], ENOUGH) if question not in asked]
    quoted = check_questions(new, ENOUGH)[1::2]
    others = [question for pair in zip(about, quoted, strict=False) for question in pair][:OTHERS]
    assert len(others) == len(set(others)) == OTHERS and not asked & set(others)
    assert not any(question.endswith(text) for question in others[1::2] for text in known)
    return Prompts(certified, others, [question for question in elsewhere[SEEN:] if question not in certified])
