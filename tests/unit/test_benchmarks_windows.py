"""What counts of an answer in a window of a real link."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.edge.token import Token

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    import windows

    return windows


def token(position: int, source: Any, verified: bool) -> Token:
    return Token(position, "", source, position, "", verified)


def answer(said: list[tuple[int, Any, bool]]) -> Iterator[Token]:
    yield from (token(*one) for one in said)


def counted(windows: Any, said: list[tuple[int, Any, bool]], tokens: int, unverified: int, end: float) -> list[str]:
    device: Any = SimpleNamespace(stats=SimpleNamespace(tokens=[0] * tokens, unverified=unverified))
    return windows.heard(device, answer(said), end)  # type: ignore[no-any-return]


CLOUD = [(7, "cloud", True), (8, "cloud", True)]
EXIT = [(at, "exit", False) for at in range(9, 14)]


def test_what_was_taken_back_does_not_count(windows: Any) -> None:
    said = [*CLOUD, *EXIT, (10, "cloud", True), (11, "cloud", True)]
    assert counted(windows, said, 5, 0, math.inf) == ["cloud", "cloud", "exit", "cloud", "cloud"]


@pytest.mark.parametrize(("unverified", "exits"), [(0, 5), (2, 3), (5, 0)])
def test_guesses_at_the_end_count_as_far_as_they_were_confirmed(windows: Any, unverified: int, exits: int) -> None:
    assert counted(windows, [*CLOUD, *EXIT], 7, unverified, math.inf) == ["cloud"] * 2 + ["exit"] * exits


def test_what_comes_or_is_confirmed_too_late_does_not_count(windows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    assert counted(windows, [*CLOUD, *EXIT, (14, "cloud", True)], 8, 0, 4.5) == ["cloud", "cloud"]
    monkeypatch.setattr(time, "monotonic", iter([0.0] * 7 + [9.0]).__next__)
    assert counted(windows, [*CLOUD, *EXIT], 7, 0, 4.5) == ["cloud", "cloud"]


def test_what_the_whole_model_guesses_counts_at_once(windows: Any) -> None:
    said = [*CLOUD, (9, "device", False), (10, "device", False)]
    assert counted(windows, said, 4, 2, math.inf) == ["cloud", "cloud", "device", "device"]
