"""Tokens as a person sees them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import get_args

import pytest

from isthmus.apps.cli.tokens import COLORS, Screen
from isthmus.edge.token import Rollback, Source, Token


def tokens(*texts: str, error: Exception | None = None) -> Iterator[Token]:
    for position, text in enumerate(texts):
        yield Token(position, text, "device", position)
    if error is not None:
        raise error


def test_an_answer_is_a_line() -> None:
    for texts, line in ((("one ", "", "two"), "one two\n"), ((), "\n"), (("", ""), "\n")):
        shown = io.StringIO()
        Screen(shown).show(tokens(*texts))
        assert shown.getvalue() == line


@pytest.mark.parametrize(("texts", "line"), [(("one",), "one\n"), (("",), ""), ((), "")])
def test_an_error_ends_the_line_that_was_begun_and_makes_none(texts: tuple[str, ...], line: str) -> None:
    shown = io.StringIO()
    with pytest.raises(ValueError):
        Screen(shown).show(tokens(*texts, error=ValueError()))
    assert shown.getvalue() == line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def guessed(screen: Screen) -> Iterator[Token]:
    """Two words that count, three guesses, of which the last two are taken back, and what comes in their place."""
    yield Token(1, "one ", "cloud", 0)
    yield Token(2, "two\n", "cloud", 1)
    for position, word in enumerate(("three ", "for ", "fife "), 2):
        yield Token(position, word, "device", position, verified=False)
    assert screen.rollback(Rollback(3, (3, 4), "for fife "))
    yield Token(5, "four ", "cloud", 3)
    yield Token(6, "five", "device", 4, "length", verified=False)


def test_a_pipe_gets_only_what_is_certain_and_the_last_guesses_at_the_end() -> None:
    shown, written = io.StringIO(), list[str]()
    screen = Screen(shown)

    def watched() -> Iterator[Token]:
        for token in guessed(screen):
            yield token
            written.append(shown.getvalue())

    screen.show(watched())
    assert shown.getvalue() == "one two\nthree four five\n"
    assert written[2:5] == ["one two\n"] * 3
    assert written[5] == "one two\nthree four "


def test_a_terminal_shows_guesses_at_once_and_what_replaces_them_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = Terminal()
    screen = Screen(shown)
    screen.show(guessed(screen))
    lines = shown.getvalue().split("\n")
    assert lines[:2] == ["one two", "three for fife "]
    assert lines[2] == "(the cloud is back and replaces the last 2 tokens)"
    assert lines[3:] == ["three four five", ""]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    screen = Screen(shown)
    screen.show(guessed(screen))
    assert "\x1b[32;4mthree " in shown.getvalue()


def test_every_source_has_a_color() -> None:
    assert set(get_args(Source)) == set(COLORS)
