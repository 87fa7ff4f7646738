"""N-gram drafts against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.drafts import NgramDrafts

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def searched(tokens: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The same by looking at every place of the text, the last first."""
    drafted: list[int] = []
    while len(drafted) < count:
        context = tokens + drafted
        for n in range(longest, shortest - 1, -1):
            end = context[-n:]
            places = [at for at in range(len(tokens) - 1, n - 1, -1) if len(end) == n and tokens[at - n : at] == end]
            if places:
                drafted.append(tokens[places[0]])
                break
        else:
            break
    return drafted


@given(TEXTS, st.integers(0, 9), st.integers(1, 4), st.integers(1, 3))
def test_drafts_are_what_a_search_finds(tokens: list[int], count: int, shortest: int, more: int) -> None:
    drafts = NgramDrafts(shortest + more, shortest)
    drafts.extend(tokens)
    assert drafts.draft(count) == searched(tokens, count, shortest + more, shortest)


@given(TEXTS, TEXTS, st.integers(0, 40))
def test_what_is_forgotten_leaves_no_trace(tokens: list[int], others: list[int], length: int) -> None:
    drafts, fresh = NgramDrafts(), NgramDrafts()
    drafts.extend(tokens)
    drafts.truncate(length)
    assert len(drafts) == min(length, len(tokens))
    fresh.extend(tokens[:length])
    assert vars(drafts) == vars(fresh)
    for one in (drafts, fresh):
        one.extend(others)
    assert drafts.draft(8) == fresh.draft(8)


def test_a_phrase_is_repeated() -> None:
    drafts = NgramDrafts()
    drafts.extend([1, 2, 3, 4, 5, 9, 9, 2, 3])
    assert drafts.draft(3) == [4, 5, 9]
    drafts.extend([7])
    assert drafts.draft(3) == []
    assert NgramDrafts().draft(3) == []
