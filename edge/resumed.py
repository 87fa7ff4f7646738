"""What a conversation's file held when it was opened: an answer to go on with, or one that is complete."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge.chat import Message, parse
from isthmus.edge.journal import Kept
from isthmus.edge.options import GenerateOptions
from isthmus.edge.text import Text
from isthmus.edge.token import CutOff, Source, Stats
from isthmus.split.tokenizer import Tokenizer


class Resumed:
    """See the module; it holds as long as nothing else is said.

    Args:
        eos: ids that end an answer.
    """

    def __init__(self, kept: Kept, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._kept, self._tokenizer, self._eos = kept, tokenizer, eos

    def unfinished(self, log: Sequence[int]) -> CutOff | None:
        """The answer that was cut off, None where there is none or the log is another one now."""
        kept = self._kept
        if kept.unfinished is None or kept.tokens != log:
            return None
        base, asked = kept.unfinished.base, kept.unfinished.asked
        text = Text(self._tokenizer.stream(), tuple(kept.unfinished.options["stop"]))
        said = "".join(text.push(token) for token in kept.tokens[base:] if token not in self._eos)
        return CutOff(said, asked[-1]["content"] if asked else self._tokenizer.decode(kept.tokens[:base]))

    def answered(self, log: Sequence[int]) -> Stats | None:
        """The chat's last answer, None where it is not complete or the log is another one now; without its costs."""
        kept = self._kept
        if kept.unfinished or not (kept.told and kept.messages) or kept.tokens != log:
            return None
        start = len(kept.tokens) - len(kept.sources)
        text = kept.messages[-1]["content"]
        return Stats(kept.tokens[start:], text, list(kept.sources), prompt_tokens=start, finish=kept.finish)

    def options(self) -> GenerateOptions:
        """How the answer that was cut off was asked for."""
        assert self._kept.unfinished is not None
        return GenerateOptions.read(self._kept.unfinished.options)

    def asked(self) -> list[Message] | None:
        """What it answers, None without a chat."""
        assert self._kept.unfinished is not None
        asked = self._kept.unfinished.asked
        return parse(asked) if asked is not None else None

    def said(self) -> list[tuple[int, Source]]:
        """Its tokens so far, and where they were computed."""
        assert self._kept.unfinished is not None
        return list(zip(self._kept.tokens[self._kept.unfinished.base :], self._kept.sources, strict=False))
