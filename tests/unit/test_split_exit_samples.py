"""What exits are trained on and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.protocol.errors import ModelError
from isthmus.split.exit_run import read_prompts, usual_head, usual_layers
from isthmus.split.exit_samples import HELD, check_questions, divided, text_files
from isthmus.split.exit_states import questions


def texts(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"text": f"{path.stem} {i}"}) for i in range(count)))
    return path


def test_the_last_tenth_of_each_file_is_held_out(tmp_path: Path) -> None:
    files = [texts(tmp_path / "a.jsonl", 30), texts(tmp_path / "b.jsonl", 2000), texts(tmp_path / "c.jsonl", 9)]
    found = divided(files)
    assert found.held == ["a 27", "a 28", "a 29", *(f"b {i}" for i in range(2000 - HELD, 2000))]
    assert len(found.taught) == 27 + 1900 + 9 and not set(found.taught) & set(found.held)
    few = divided(files, 60)
    assert few.held == found.held and few.taught == [
        *(f"a {i}" for i in range(20)), *(f"b {i}" for i in range(20)), *(f"c {i}" for i in range(9)),
    ]  # fmt: skip


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="9 documents are too few; give a file of at least 10"):
        divided([texts(tmp_path / "a.jsonl", 9)])


def test_folders_stand_for_their_files(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", 1), texts(tmp_path / "b.txt", 1)
    (tmp_path / "c.bin").write_bytes(b"")
    assert text_files([tmp_path, b]) == [a, b, b]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no \.jsonl and no \.txt file"):
        text_files([tmp_path / "empty"])


def test_nothing_is_trained_on_what_is_checked() -> None:
    taught, held = [f"taught {i}" for i in range(400)], [f"held {i}" for i in range(400)]
    for count in (10, 320, 450):
        trained, checked = questions(taught, 900), check_questions(held, count)
        assert len(checked) == len(set(checked)) == count and not set(trained) & set(checked)
    assert not set(questions([], 450)) & set(check_questions([], 450)) and len(check_questions([], 450)) == 450


def test_prompts_are_lines_or_documents(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One?\n\n  Two?\n")
    assert read_prompts(tmp_path / "p.txt") == ["One?", "Two?"]
    assert read_prompts(texts(tmp_path / "p.jsonl", 2)) == ["p 0", "p 1"]


def test_where_exits_usually_stand() -> None:
    assert usual_layers(30) == [15, 20, 24, 27] and usual_layers(2) == [1] and usual_layers(4) == [2, 3]
    assert [usual_head(layer, 30) for layer in (15, 19, 20, 27)] == [8192, 8192, 0, 0]
