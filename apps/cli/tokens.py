"""Tokens on a terminal, coloured by where they were computed."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from isthmus.edge.experts.report import ExpertReport
    from isthmus.edge.token import Rollback, Stats, Token

COLORS = {"device": "32", "cloud": "34", "split": "35", "verified": "36", "exit": "33"}  # and cyan, yellow
GUESS = ";4"  # underlined
RESET = "\x1b[0m"


def has_color(stream: TextIO) -> bool:
    """Whether a stream shows colours: a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """A remark beside the text."""
    return f"\x1b[2m{text}{RESET}" if has_color(stream) else text


def legend() -> str:
    """What the colours mean, coloured."""
    return "  ".join(f"\x1b[{code}m{source}{RESET}" for source, code in COLORS.items())


class Screen:
    """Text as it is made, on a terminal or in a pipe.

    A terminal shows guesses at once, underlined, and what replaces them below; a pipe gets what is certain, and at
    the end what nobody confirmed.

    Args:
        stream: standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._colored = has_color(self._stream)
        self._style = ""
        self._text = ""  # of this answer, as it stands
        self._guesses: list[str] = []  # texts of the last tokens, as long as they are not certain

    def show(self, tokens: Iterable[Token], so_far: str = "") -> None:
        """Writes an answer's text so far, its tokens as they come, and ends the line."""
        begun, self._text, self._guesses = bool(so_far), "", []
        self._write(so_far)
        try:
            for token in tokens:
                begun = begun or bool(token.text)
                if token.verified:
                    self._certain()
                    self._write(token.text, token)
                elif self._terminal:
                    self._guesses.append(token.text)
                    self._write(token.text, token)
                else:
                    self._guesses.append(token.text)
            self._certain()
            begun = True  # an empty answer is a line, too; an error before the first word is not
        finally:
            if begun:
                self._stream.write(f"{RESET if self._style else ''}\n")
                self._stream.flush()
            self._style = ""

    def pause(self) -> bool:
        """Ends the line on a terminal where something else is to be said in the middle of an answer.

        Returns:
            Whether a line is still open, as on what is no terminal, where nothing but the answer is written.
        """
        opened = bool(self._text) and not self._text.endswith("\n")
        if not (self._terminal and opened):
            return opened
        self._stream.write(f"{RESET if self._style else ''}\n")
        self._stream.flush()
        self._style = ""
        return False

    def rollback(self, wrong: Rollback) -> bool:
        """A device's `on_rollback`: takes guesses back."""
        count = len(wrong.tokens)
        del self._guesses[len(self._guesses) - count :]
        if self._terminal and wrong.text:
            self._text = self._text[: len(self._text) - len(wrong.text)]
            remark = dim(f"(the cloud is back and replaces the last {count} tokens)", self._stream)
            self._stream.write(f"{RESET if self._style else ''}\n{remark}\n{self._text.rpartition(chr(10))[2]}")
            self._style = ""
        return True

    @property
    def _terminal(self) -> bool:
        return self._stream.isatty()

    def _certain(self) -> None:
        if not self._terminal:
            for text in self._guesses:
                self._write(text)
        self._guesses = []

    def _write(self, text: str, token: Token | None = None) -> None:
        if not text:
            return
        if self._colored and token is not None:
            style = COLORS[token.source] + ("" if token.verified else GUESS)
            if style != self._style:
                self._stream.write(f"{RESET if self._style else ''}\x1b[{style}m")
                self._style = style
        self._text += text
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def speaking_up(screen: Screen) -> Iterator[None]:
    """Says what a device waits for when it begins to, on standard error and on a line of its own."""

    class Spoken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            screen.pause()
            print(f"note: {record.getMessage()}", file=sys.stderr)

    logger, spoken = logging.getLogger("isthmus.edge"), Spoken()
    logger.addHandler(spoken)
    try:
        yield
    finally:
        logger.removeHandler(spoken)


def summary(stats: Stats) -> str:
    """What an answer cost, on one line."""
    made = ", ".join(f"{count} {source}" for source, count in Counter(stats.sources).items())
    line = f"{len(stats.tokens)} tokens ({made or 'none'}), "
    line += f"the first after {stats.ttft_ms:.0f} ms, {stats.tok_s:.1f} tokens/s"
    if stats.bytes_up or stats.bytes_down:
        line += f", {stats.bytes_up:,} bytes up, {stats.bytes_down:,} down, {stats.round_trips} round trips"
    if stats.unverified or stats.replaced:
        line += f"; while the cloud was silent {stats.unverified + stats.replaced} were guessed that it did not confirm"
        line += f", {stats.replaced} of them replaced" if stats.replaced else ""
    return line


def expert_summary(report: ExpertReport) -> str:
    """What experts cost since the device was opened, on one line."""
    line = f"experts: {report.hit_rate:.0%} were in memory ({report.resident_bytes / 1e6:.1f} MB), "
    return line + f"{report.read_bytes / 1e6:.1f} MB were read in {report.reading_seconds:.2f} s"
