"""Tokens as a person sees them."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from isthmus.apps.cli.tokens import Screen
from isthmus.edge.token import Token


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
