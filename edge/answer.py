"""One answer, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from isthmus.edge.controller import GaveUp
from isthmus.edge.conversation import Conversation
from isthmus.edge.notes import Notes
from isthmus.edge.options import GenerateOptions
from isthmus.edge.runners import Runner
from isthmus.edge.steering import Steering
from isthmus.edge.text import Text
from isthmus.edge.token import Token
from isthmus.protocol.errors import IsthmusError


class Answer:
    """See the module.

    Args:
        text: decodes its tokens.
        eos: tokens that end it.
        started: when it was asked for, by `time.perf_counter`.
        ended: told the text when it is complete or nobody wants more of it.
    """

    def __init__(
        self,
        conversation: Conversation,
        steering: Steering,
        notes: Notes,
        options: GenerateOptions,
        text: Text,
        eos: Sequence[int],
        started: float,
        ended: Callable[[str], None],
    ) -> None:
        self._conversation, self._steering, self._notes = conversation, steering, notes
        self._options, self._text, self._eos = options, text, frozenset(eos)
        self._started, self._ended = started, ended
        self._runner: Runner = steering.runner(options)

    def tokens(self) -> Generator[Token]:
        """The tokens as they are made; to be read once."""
        log, limit, stats = self._conversation.log, self._options.max_tokens, self._notes.stats
        pieces: list[str] = []
        first = last = self._started
        stats.reused_tokens = max(0, self._runner.reused())
        try:
            while not stats.finish:
                token = self._next(limit - len(stats.tokens))
                last = time.perf_counter()
                position, source = len(log), self._runner.source
                log.extend((token,))
                stats.tokens.append(token)
                stats.sources.append(source)
                if len(stats.tokens) == 1:
                    first = last
                piece, finish = "", "eos"
                if token not in self._eos:
                    piece = self._text.push(token)
                    finish = "stop" if self._text.stopped else "length" if len(stats.tokens) == limit else ""
                if finish:
                    piece += self._text.finish()
                    stats.finish = finish
                pieces.append(piece)
                yield Token(token, piece, source, position, finish)
        finally:
            stats.finish = stats.finish or "cancelled"
            stats.text = "".join(pieces)
            if stats.tokens:
                stats.ttft_ms = (first - self._started) * 1e3
                stats.tok_s = (len(stats.tokens) - 1) / (last - first) if last > first else 0.0
            self._steering.finish(self._runner, stats)
            self._ended(stats.text)

    def _next(self, wanted: int) -> int:
        while True:
            self._conversation.check(len(self._conversation.log))
            self._runner = self._steering.turn(self._options, self._runner, wanted)
            try:
                token = self._runner.next(self._conversation.remaining(wanted))
            except GaveUp:
                self._runner = self._steering.given_up(self._options, self._runner)
                continue
            except IsthmusError as error:
                self._runner = self._steering.alone(self._options, self._runner, error)
                continue
            self._notes.waited()
            self._steering.came(self._runner)
            return token
