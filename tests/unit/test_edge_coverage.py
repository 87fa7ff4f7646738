"""Which positions have KV how deep."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.coverage import Coverage

MOVES = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 6)), max_size=20)


@given(st.integers(0, 20), st.integers(1, 20), st.data())
def test_positions_go_deeper(deep: int, more: int, data: st.DataObject) -> None:
    coverage = Coverage()
    if deep:
        coverage.extend(deep, 6)
    coverage.extend(deep + more, 3)
    end = data.draw(st.integers(deep + 1, deep + more))
    coverage.deepen(end, 6)
    assert (coverage.at(6), coverage.at(3), coverage.length) == (end, deep + more, deep + more)
    coverage.truncate(end)
    coverage.extend(end + 1, 6)
    assert coverage.at(6) == coverage.length == end + 1


@given(MOVES)
def test_coverage_is_what_a_list_of_depths_says(moves: list[tuple[bool, int, int]]) -> None:
    coverage = Coverage()
    depths: list[int] = []
    for grows, n, depth in moves:
        if grows and n:
            depths += [depth] * n
            coverage.extend(len(depths), depth)
        else:
            del depths[n:]
            coverage.truncate(n)
        assert coverage.length == len(depths)
        for wanted in range(1, 7):
            reached = next((i for i, d in enumerate(depths) if d < wanted), len(depths))
            assert coverage.at(wanted) == reached
