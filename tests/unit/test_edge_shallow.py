"""States that are held until the rest is made of them: a part of what came, never anything else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.shallow import ShallowStates

WIDTH = 2
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([3, 3, 3, 5]), st.integers(-2, 3), st.integers(1, 5)),
        st.tuples(st.just("truncate"), st.integers(0, 30)),
        st.tuples(st.just("at"), st.integers(0, 30), st.integers(1, 6)),
    ),
    max_size=30,
)


@given(MOVES, st.sampled_from([40, 100, 10_000]))
def test_what_is_held_is_what_came(moves: list[tuple[object, ...]], most: int) -> None:
    held, truth, cut, end, mark, asked = ShallowStates(most), dict[int, float](), 0, 0, 0.0, 0
    for move in moves:
        if move[0] == "add":
            _, wanted, step, count = move
            assert isinstance(wanted, int) and isinstance(step, int) and isinstance(count, int)
            position = max(0, end + step)
            if wanted != cut or position > end:
                truth.clear()
            cut, end = wanted, position + count
            truth = {at: value for at, value in truth.items() if at < position}
            states = np.empty((count, WIDTH), np.float32)
            for row in range(count):
                mark += 1.0
                states[row] = truth[position + row] = mark
            held.add(wanted, position, states)
        elif move[0] == "truncate":
            end = min(end, int(str(move[1])))
            truth = {at: value for at, value in truth.items() if at < end}
            held.truncate(end)
        else:
            position, count = int(str(move[1])), int(str(move[2]))
            found = held.at(position, count)
            if found is None:
                assert position not in truth or position < asked or most < 10_000
            else:
                assert held.cut == cut and 1 <= len(found) <= count
                assert [truth[position + row] for row in range(len(found))] == found[:, 0].tolist()
            asked = max(asked, position)  # those before may be forgotten


def test_the_older_ones_go_when_there_are_too_many() -> None:
    held = ShallowStates(10 * 4 * WIDTH)
    for at in range(0, 20, 5):
        held.add(3, at, np.full((5, WIDTH), at, np.float32))
    assert held.at(0, 5) is None and held.at(9, 5) is None
    found = held.at(11, 9)
    assert found is not None and found.tolist() == [[10.0] * WIDTH] * 4
