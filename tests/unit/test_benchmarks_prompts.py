"""Which prompts benchmarks ask the exits of SmolLM2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from isthmus.split.exit_samples import check_questions, divided
from isthmus.split.exit_states import CHECK_TOPICS, questions

ROOT = Path(__file__).resolve().parents[2]


def texts(path: Path) -> Path:
    """Documents, of which the third last of what is not held out was also trained on."""
    found = [f"{path.stem} {i}." for i in range(1000)]
    found[897] = found[0]
    path.write_text("\n".join(json.dumps({"text": text}) for text in found))
    return path


def test_what_exits_are_measured_with_is_nothing_that_they_were_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from prompts import OTHERS, prompts

    files = [texts(tmp_path / "a.jsonl"), texts(tmp_path / "b.jsonl")]
    certified, others, kept_back = prompts(files)
    assert certified == check_questions(divided(files).held, 320)
    assert len(others) == len(set(others)) == OTHERS
    topical = set(questions([], 10_000, topics=CHECK_TOPICS))
    assert [question in topical for question in others] == [True, False] * (OTHERS // 2)
    assert not set(others) & {*certified, *questions([], 200, topics=CHECK_TOPICS), *questions([], 10_000)}
    quoted = [question.split()[-2:] for question in others[1::2]]
    assert {stem for stem, _ in quoted} == {"a", "b"}
    assert all(500 <= int(number.rstrip(".")) < 900 for _, number in quoted)
    elsewhere = questions([], 200, topics=CHECK_TOPICS)
    assert len(kept_back) >= 50 and set(kept_back) <= set(elsewhere[24:])
    assert not set(kept_back) & {*certified, *others, *questions([], 10_000)}
    assert prompts(files) == (certified, others, kept_back)
