"""What a person is told while a bundle is fetched, and when an answer was cut off."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isthmus.apps.cli.chat import cut_off
from isthmus.apps.cli.fetching import Fetching
from tests.edge_bundle import write_tiny


@pytest.mark.parametrize("mode", ["local", "auto", "split", "stream"])
def test_what_is_fetched_is_said_once(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "tiny")
    (folder / "bundle.json").rename(folder / "bundle.json.part")
    with Fetching(folder, mode, 2) as fetching:
        for done in (1, 2):
            fetching.progress("layer", done, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("fetching ") and said.endswith(f" MB) into {folder}\n")


def test_a_part_that_grows_is_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Fetching(Path("mine"), "local", None) as fetching:
        fetching.progress("layer", 1, 1)
    assert capsys.readouterr().err == "fetching more of the model into ./mine\n"


@pytest.mark.parametrize(("finish", "terminal", "said"), [("length", True, 1), ("eos", True, 0), ("length", False, 0)])
def test_an_answer_that_was_cut_off(
    finish: str, terminal: bool, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    cut_off(cast("Any", SimpleNamespace(stats=SimpleNamespace(finish=finish))), 7)
    assert capsys.readouterr().err.count("--max-tokens") == said
