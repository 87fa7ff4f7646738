"""Threads of a run: how many, and on which processors."""

from __future__ import annotations

from itertools import chain

import pytest

from isthmus.engine.affinity import KEY, places, use_threads
from isthmus.engine.graph_part import part_options


@pytest.mark.parametrize(
    ("allowed", "threads", "told"),
    [({0, 1}, 2, "2"), ({0, 2, 5}, 3, "3;6"), ({0, 1}, 1, ""), ({0, 1}, 0, ""), ({3}, 2, "")],
)
def test_threads_stay_on_processors_of_their_own(
    allowed: set[int], threads: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr("isthmus.engine.affinity.capacity", lambda processor: 1)
    options = part_options()
    use_threads(options, threads)
    assert options.intra_op_num_threads == threads
    if told:
        assert options.get_session_config_entry(KEY) == told
    else:
        with pytest.raises(RuntimeError):  # there is no such entry
            options.get_session_config_entry(KEY)


def test_the_fastest_processors_are_taken() -> None:
    chip = {0: 300, 1: 300, 2: 300, 3: 300, 4: 1024, 5: 1024, 6: 700, 7: 700}
    for process in (1, 2, 3):
        assert places(chip, 2, process) == [4, 5]
        assert places(chip, 4, process) == [4, 5, 6, 7]
        assert places(chip, 6, process) == [4, 5, 6, 7, 0, 1]


def test_processes_spread_over_processors_that_are_alike() -> None:
    server = dict.fromkeys(range(16), 0)
    taken = [places(server, 4, process) for process in range(4)]
    assert sorted(chain.from_iterable(taken)) == list(range(16))
    assert all(len(set(places(server, 5, process))) == 5 for process in range(100))
