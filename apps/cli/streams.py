"""The program's standard streams: each may be closed, full, or read by nobody any more."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class OutputFailed(Exception):
    """Standard output takes nothing more.

    Deliberately neither an OSError, which rich and typer turn into exit code 1, nor an error of isthmus, after which
    a chat would go on.

    Attributes:
        problem: what the system says.
        reader_gone: whether it is a pipe whose reader has ended, as with `| head`.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.problem = error.strerror or str(error)
        self.reader_gone = error.errno == errno.EPIPE


def guard() -> None:
    """Makes the standard streams safe to use; once, at the program's start.

    Closed streams become /dev/null, lest a socket or a weight file take their number. From then on writing to
    standard output raises OutputFailed, and what standard error does not take is dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  a number, open for as long as the program runs
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # whoever reads says what is wrong, a line at a time
    sys.stdout = _text(_Output(1, "wb", closefd=False), sys.stdout, "replace")
    sys.stderr = _text(_Errors(2, "wb", closefd=False), sys.stderr, "backslashreplace")


def discard() -> None:
    """Sends what standard output still holds, and all that follows, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class _Output(io.FileIO):
    """Unbuffered: a buffer would write once more what Ctrl-C interrupted after it was written."""

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                count = super().write(left)
                if count is None:  # another program made the terminal non-blocking
                    select.select([], [self], [])
                else:
                    left = left[count:]
        except OSError as error:
            raise OutputFailed(error) from None
        return size


class _Errors(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            count = super().write(data)
        except OSError:
            count = None
        return len(data) if count is None else count  # what nobody takes is dropped


def _text(raw: io.FileIO, before: TextIO | None, errors: str) -> TextIO:
    """A text stream like the one `before`, over another file, that takes any character."""
    encoding, lines = "utf-8", raw.isatty()
    if isinstance(before, io.TextIOWrapper):
        encoding, lines = before.encoding, before.line_buffering or before.write_through
        errors = errors if before.errors == "strict" else before.errors or errors
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=lines)
