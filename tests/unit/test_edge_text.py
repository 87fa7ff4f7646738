"""Text that streams, and ends before a stop word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.text import Text
from tests.edge_world import ToyTokenizer


def shares(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """The share of each token of a text, and whether a stop word came."""
    stream = Text(ToyTokenizer().stream(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    pieces.append(stream.finish())
    return pieces, False


@given(st.text(max_size=40))
def test_shares_join_to_the_text(text: str) -> None:
    assert "".join(shares(text, ())[0]) == text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_word(text: str, stop: list[str]) -> None:
    pieces, stopped = shares(text, tuple(stop))
    # The word that is complete first ends the text; of those complete at the same letter, the one that began first.
    expected = text
    for end in range(1, len(text) + 1):
        begun = [text[:end].find(word) for word in stop if word in text[:end]]
        if begun:
            expected = text[: min(begun)]
            break
    assert "".join(pieces) == expected
    assert stopped == any(word in text for word in stop)


def test_a_character_is_held_until_it_is_whole() -> None:
    assert shares("é!", ())[0] == ["", "é", "!", ""]


def test_the_beginning_of_a_stop_word_is_held_and_released() -> None:
    assert shares("a<b", ("<end>",))[0] == ["a", "", "<b", ""]
    assert shares("a<e", ("<end>",))[0] == ["a", "", "", "<e"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    stream = Text(ToyTokenizer().stream())
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"
