"""What n-grams would have drafted is what they would have drafted, however an answer arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.drafts import NgramDrafts
from isthmus.edge.shadow import DRAFTED, Shadow


def rounds(prompt: list[int], answer: list[int]) -> list[tuple[int, int]]:
    """Verify mode's rounds, one after the other, as far as they are over."""
    text, drafts, found = prompt + answer, NgramDrafts(), []
    drafts.extend(prompt)
    while len(drafts) < len(text):
        at, guesses = len(drafts), drafts.draft(DRAFTED)
        taken = 0
        while taken < len(guesses) and at + taken < len(text) and guesses[taken] == text[at + taken]:
            taken += 1
        if at + taken >= len(text):
            break
        found.append((len(guesses), taken))
        drafts.extend(text[at : at + taken + 1])
    return found


TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS, TOKENS, st.lists(st.integers(1, 7), max_size=20))
def test_rounds_do_not_depend_on_how_tokens_arrive(prompt: list[int], answer: list[int], pieces: list[int]) -> None:
    seen: list[tuple[int, int]] = []
    shadow, at = Shadow(lambda drafted, taken: seen.append((drafted, taken))), 0
    shadow.learn(prompt)
    for piece in [*pieces, len(answer)]:
        at = min(at + piece, len(answer))
        shadow.follow(prompt + answer[:at])
    assert seen == rounds(prompt, answer)


def test_what_is_cut_off_is_forgotten() -> None:
    seen: list[tuple[int, int]] = []
    shadow = Shadow(lambda drafted, taken: seen.append((drafted, taken)))
    shadow.learn([1, 2, 3, 1, 2])
    shadow.truncate(2)
    shadow.follow([1, 2, 3])
    assert seen == [(0, 0)]
