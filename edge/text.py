"""From token ids to text, one token at a time, ending at a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Protocol

from isthmus.protocol.errors import DeviceError


class Pieces(Protocol):
    """Text of ids that arrive one by one."""

    def push(self, ids: int, /) -> str: ...

    def finish(self) -> str: ...


class Text:
    """Gives each token's share of the text.

    A text is held back while it may be half of a character or the beginning of a stop word; the joined shares are the
    text up to, and without, the first stop word.

    Args:
        pieces: turns ids into text.
        stop: words that end the text, none of them empty.

    Attributes:
        stopped: whether a stop word came.
    """

    def __init__(self, pieces: Pieces, stop: Sequence[str] = ()) -> None:
        self._pieces, self._stop = pieces, tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` adds."""
        text = self._pieces.push(token)
        if not self._stop:
            return text
        return self._release(text)

    def finish(self) -> str:
        """What is still held back when the tokens have ended."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    for size in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:size]):
            return size
    return 0


def utf8(text: str) -> str:
    """A text as it is.

    Raises:
        DeviceError: it has surrogates, as stand for bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DeviceError("the prompt is not UTF-8 text", "give text, or - with text on standard input") from error
    return text


class Encoder(Protocol):
    """Turns text into ids."""

    def encode(self, text: str, /) -> list[int]: ...


def token_ids(prompt: str | Sequence[int], tokenizer: Encoder, vocab_size: int) -> list[int]:
    """A prompt's token ids.

    Raises:
        DeviceError: it is empty, or an id is none of the vocabulary.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(utf8(prompt))
    else:
        try:
            ids = [index(token) for token in prompt]
        except TypeError as error:
            raise DeviceError("the prompt has something that is no token", "give a text or token ids") from error
    if not ids:
        raise DeviceError("the prompt is empty", "give at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise DeviceError(f"the prompt has token {token}", f"the vocabulary has {vocab_size}")
    return ids
