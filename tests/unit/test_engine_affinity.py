"""Threads of a run: how many, and on which processors."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from isthmus.engine.affinity import KEY, places, rank, use_threads
from isthmus.engine.graph_part import part_options


@pytest.mark.parametrize(
    ("allowed", "threads", "told"),
    [({0, 1}, 2, "2"), ({0, 2, 5}, 3, "3;6"), ({0, 1}, 1, ""), ({0, 1}, 0, ""), ({3}, 2, "")],
)
def test_threads_stay_on_processors_of_their_own(
    allowed: set[int], threads: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr("isthmus.engine.affinity.rank", lambda processor: (0, 0))
    options = part_options()
    use_threads(options, threads)
    assert options.intra_op_num_threads == threads
    if told:
        assert options.get_session_config_entry(KEY) == told
    else:
        with pytest.raises(RuntimeError):  # there is no such entry
            options.get_session_config_entry(KEY)


def test_the_fastest_processors_are_taken() -> None:
    speeds = {0: 300, 1: 300, 2: 300, 3: 300, 4: 1024, 5: 1024, 6: 700, 7: 700}
    chip = {processor: (-speed, 0) for processor, speed in speeds.items()}
    for process in (1, 2, 3):
        assert places(chip, 2, process) == [4, 5]
        assert places(chip, 4, process) == [4, 5, 6, 7]
        assert places(chip, 6, process) == [4, 5, 6, 7, 0, 1]


def test_processes_spread_over_processors_that_are_alike() -> None:
    server = dict.fromkeys(range(16), (0, 0))
    taken = [places(server, 4, process) for process in range(4)]
    assert sorted(chain.from_iterable(taken)) == list(range(16))
    assert all(len(set(places(server, 5, process))) == 5 for process in range(100))


def test_each_core_is_taken_before_a_twin() -> None:
    pairs = {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1), 4: (0, 0), 5: (0, 1)}
    assert places(pairs, 3, 1) == [0, 2, 4]
    assert {*places(pairs, 2, 7)} < {0, 2, 4}
    assert places(pairs, 4, 1) == [0, 2, 4, 1]


def test_what_the_system_tells_of_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.engine.affinity.CAPACITY", str(tmp_path / "{}"))
    monkeypatch.setattr("isthmus.engine.affinity.TWINS", str(tmp_path / "twins{}"))
    assert rank(3) == (0, 0)  # nothing
    (tmp_path / "3").write_text("1024\n")
    (tmp_path / "twins3").write_text("1,3\n")
    assert rank(3) == (-1024, 1)
    (tmp_path / "twins3").write_text("2-3\n")
    assert rank(3) == (-1024, 1)
    (tmp_path / "3").write_text("fast")
    (tmp_path / "twins3").write_text("?")
    assert rank(3) == (0, 0)
