"""`isthmus experts calibrate`, and a device that reads experts as it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.apps.cli.main import main
from isthmus.edge import Device, ExpertSettings
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.split.bundle import Bundle
from tests.edge_bundle import CONFIG, write_tiny

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
Capture = pytest.CaptureFixture[str]
EXPERTS = ExpertsConfig(8, 3, CONFIG.d_ff)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny", experts=EXPERTS, format="n8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents of which 40 are held out."""
    rng, path = np.random.default_rng(0), tmp_path / "some.jsonl"
    words = ["river", "stone", "light", "seven", "walk", "under", "green", "slow"]
    documents = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def calibrate(folder: Path, text: Path, *more: str) -> int:
    return main(["experts", "calibrate", str(folder), "--text", str(text), "--threads", "1", *more])


def test_what_is_certified_is_kept_and_read(folder: Path, text: Path, capsys: Capture) -> None:
    assert calibrate(folder, text, "--within", "0.2") == 0
    said = capsys.readouterr().out
    found = Bundle.open(folder).manifest.tolerance
    assert found is not None and found.documents == 40 and found.within == 0.2 and found.bound <= 0.2
    assert f"{found.bits:.2f} bits in the mean" in said and "rises at most (95%)" in said
    assert main(["inspect", str(folder)]) == 0
    assert f"{found.bits:.2f} bits in the mean" in capsys.readouterr().out
    answers = {}
    for mode in ("exact", "bounded"):
        settings = ExpertSettings(mb=2, mode=mode)
        with Device(folder, experts=settings, mode="local", threads=1) as device:
            answers[mode] = "".join(token.text for token in device.generate("a stone", max_tokens=12))
            assert device.expert_report is not None
    assert answers["exact"] != answers["bounded"]  # of a model that is as unsure as random weights are


def test_json_tells_what_was_tried(folder: Path, text: Path, capsys: Capture) -> None:
    assert calibrate(folder, text, "--within", "0.2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in told["tried"]] == list(range(len(told["tried"])))
    assert told["tolerance"]["bits"] == [one["bits"] for one in told["tried"] if one["passed"]][-1]


def test_the_same_documents_take_away_what_they_do_not_give(folder: Path, text: Path, capsys: Capture) -> None:
    """What other documents gave stays unless --force takes it away."""
    assert calibrate(folder, text, "--within", "0.2") == 0
    before = Bundle.open(folder).manifest.tolerance
    assert calibrate(folder, text, "--within", "0.000001") == 0
    assert "what the bundle had stays" in capsys.readouterr().out
    assert Bundle.open(folder).manifest.tolerance == before
    assert calibrate(folder, text, "--within", "0.000001", "--force") == 0
    assert "nothing but all bits" in capsys.readouterr().out
    assert Bundle.open(folder).manifest.tolerance is None


def test_mistakes_are_said_in_one_line(folder: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    def fails(said: str, code: int) -> None:
        error = capsys.readouterr().err
        assert code == 2 and said in error and error.count("\n") == 1

    fails("within 0 is impossible", calibrate(folder, text, "--within", "0"))
    fails("confidence 2 is impossible", calibrate(folder, text, "--confidence", "2"))
    fails("10 documents are too few", calibrate(folder, text, "--documents", "10"))
    fails("has no experts", calibrate(write_tiny(tmp_path / "dense"), text))
    fails("not nested", calibrate(write_tiny(tmp_path / "plain", experts=EXPERTS), text))
    run = ["run", str(folder), "--prompt", "x", "--max-tokens", "1"]
    fails("nobody has measured", main([*run, "--expert-mb", "2", "--experts", "bounded"]))
    fails("--experts has no effect without --expert-mb", main([*run, "--experts", "bounded"]))
    assert calibrate(folder, text, "--within", "0.2") == 0
    capsys.readouterr()
    bounded = [*run, "--expert-mb", "2", "--experts", "bounded"]
    fails("a cloud answers as the model does", main([*bounded, "--cloud", "127.0.0.1:9", "--no-keys"]))
    fails("may need all bits", main([*bounded, "--expert-bits", "4"]))
    fails("choose one of exact, bounded, cloud", main([*run, "--expert-mb", "2", "--experts", "some"]))
