"""What others took of the processor, from the kernel's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.apps.bench.calm import Calm, calm_enough


def ticks(path: Path, user: int, idle: int, steal: int) -> None:
    path.write_text(f"cpu  {user} 2 3 {idle} 5 0 0 {steal} 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")


def test_what_is_taken_is_a_share_of_what_was_wanted(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    ticks(stat, 100, 1000, 10)
    calm = Calm(stat)
    ticks(stat, 175, 9000, 35)
    assert calm.taken() == pytest.approx(0.25)  # idle time was not wanted
    assert calm.taken() == 0.0


@pytest.mark.parametrize("text", ["", "cpu 1 2", "cpu a b c d e f g h", None])
def test_a_kernel_that_does_not_tell_takes_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    calm = Calm(tmp_path / "stat")
    calm.wait(5.0)
    assert calm.taken() == 0.0


@pytest.mark.parametrize(
    ("taken", "count"),
    [
        ([], []),
        ([0.9], [0]),
        ([0.0, 0.01, 0.04], [0, 1, 2]),
        ([0.5, 0.2, 0.01, 0.3], [1, 2]),
        ([0.5, 0.2, 0.4], [1, 2]),
        ([0.06, 0.0, 0.0, 0.0], [1, 2, 3]),
    ],
)
def test_the_calm_rounds_count_and_half_of_all_at_least(taken: list[float], count: list[int]) -> None:
    assert calm_enough(taken) == count
