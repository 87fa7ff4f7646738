"""Tokens on a terminal, coloured by where they were computed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from isthmus.edge.token import Stats, Token

COLORS = {"device": "32", "cloud": "34", "split": "35"}  # green, blue, magenta
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


def show(tokens: Iterable[Token], stream: TextIO | None = None) -> None:
    """Writes tokens as they come, and ends the line."""
    stream = stream or sys.stdout
    colored, last, begun = has_color(stream), "", False
    try:
        for token in tokens:
            if not token.text:
                continue
            begun = True
            if colored and token.source != last:
                stream.write(f"\x1b[{COLORS[token.source]}m")
                last = token.source
            stream.write(token.text)
            stream.flush()
        begun = True  # an empty answer is a line, too; an error before the first word is not
    finally:
        if begun:
            stream.write(f"{RESET}\n" if last else "\n")
            stream.flush()


def summary(stats: Stats) -> str:
    """What an answer cost, on one line."""
    places = " + ".join(dict.fromkeys(stats.sources)) or "nowhere"
    line = f"{len(stats.tokens)} tokens on {places}, the first after {stats.ttft_ms:.0f} ms, {stats.tok_s:.1f} tokens/s"
    if stats.bytes_up or stats.bytes_down:
        line += f", {stats.bytes_up:,} bytes up, {stats.bytes_down:,} down, {stats.round_trips} round trips"
    return line
