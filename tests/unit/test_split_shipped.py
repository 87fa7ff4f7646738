"""The exits that come with isthmus."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import msgspec
import pytest

from isthmus.apps.cli.main import main
from isthmus.split.certificate import Certificate
from isthmus.split.exit_entry import MAX_HEAD_TOKENS
from isthmus.split.shipped import FOLDER, LIST, Heads, shipped
from isthmus.split.tensorfile import TensorFile

FOLDERS = sorted(path.parent for path in FOLDER.glob(f"*/{LIST}"))
AIMS = {15: 0.42, 20: 0.50, 24: 0.60, 27: 0.70}  # agreement on held-out documents


def listed(name: str) -> Heads:
    return msgspec.json.decode((FOLDER / name / LIST).read_bytes(), type=Heads)


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS])
def test_heads_are_whole_and_what_their_list_says(name: str) -> None:
    heads = listed(name)
    found = shipped(heads.model_id)
    assert found and heads.commands and {one.layer for one, _ in found} == {one.layer for one in heads.exits}
    for entry, _ in found:
        file = TensorFile(FOLDER / name / entry.file.rpartition("/")[2])
        assert file.metadata["model_id"] == heads.model_id
        entry.check(1000, heads.sha256[file.path.name])
        rows = len(file.array("head_tokens")) if entry.head_tokens else 0
        assert rows == entry.head_tokens <= MAX_HEAD_TOKENS
        assert {"channel_mean", "channel_spread", "final_norm"} <= set(file.tensors)


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS])
def test_the_commands_that_made_them_are_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in listed(name).commands:
        isthmus, *words = shlex.split(command)
        called = words[:2] if words[0] == "exits" else words[:1]
        assert isthmus == "isthmus" and main([*called, "--help"]) == 0
        help = capsys.readouterr().out
        assert [word for word in words if word.startswith("-") and word not in help] == []


def test_what_was_measured_of_them_is_what_they_say() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "exits.json"
    figures = {name: entry["value"] for name, entry in json.loads(results.read_text())["figures"].items()}
    for one in listed("smollm2").exits:
        assert one.certificate is not None
        said = {
            f"agreement/documents/exit {one.layer}": one.agreement.documents,
            f"agreement/own answers/exit {one.layer}": one.agreement.answers,
            f"emitted as certified/exit {one.layer}": one.certificate.emitted,
            f"disagreement as certified/exit {one.layer}": one.certificate.risk,
        }
        assert {name: figures[name] for name in said} == pytest.approx(said, abs=2e-3)


def test_those_of_smollm2_reach_their_aims() -> None:
    heads = listed("smollm2")
    assert {one.layer for one in heads.exits} == set(AIMS)
    for entry in heads.exits:
        assert entry.agreement.documents >= AIMS[entry.layer]
        assert isinstance(entry.certificate, Certificate)
        assert entry.certificate.disagreement <= 0.05 and entry.certificate.confidence >= 0.95
        assert entry.codec is not None and entry.codec.agreement >= entry.codec.exact - 0.01
        assert entry.codec.row_bytes < 576  # half of f16
    assert sum(path.stat().st_size for path in (FOLDER / "smollm2").iterdir()) <= 8_000_000
