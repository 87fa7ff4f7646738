"""One answer, token by token, whatever the cloud does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal

from isthmus.edge.bridge import Bridge
from isthmus.edge.controller import GaveUp
from isthmus.edge.conversation import Conversation
from isthmus.edge.link import Silent
from isthmus.edge.notes import Notes
from isthmus.edge.options import GenerateOptions
from isthmus.edge.runners import Runner
from isthmus.edge.steering import Steering
from isthmus.edge.text import Text
from isthmus.edge.token import Rollback, Source, Token
from isthmus.protocol.errors import IsthmusError, LinkError

OnRollback = Literal["replace", "keep"] | Callable[[Rollback], bool]


class Answer:
    """See the module.

    A runner makes the tokens that count, one after the other. While the cloud is silent a bridge goes on ahead of it
    with guesses, which the caller gets at once; what the runner says afterwards confirms them or takes them back. So
    the text that stands in the end is the runner's, as if the link had never failed.

    Args:
        text: makes a decoder of its tokens.
        eos: tokens that end it.
        said: its last tokens in the log and where they were computed, when it was begun earlier.
        started: when it was asked for, by `time.perf_counter`.
        on_rollback: what becomes of guesses that were wrong; as in `Device`.
        ended: told the text when it is complete or nobody wants more of it.
    """

    def __init__(
        self,
        conversation: Conversation,
        steering: Steering,
        notes: Notes,
        options: GenerateOptions,
        text: Callable[[], Text],
        eos: Sequence[int],
        started: float,
        on_rollback: OnRollback,
        ended: Callable[[str], None],
        said: Sequence[tuple[int, Source]] = (),
    ) -> None:
        self._conversation, self._steering, self._notes = conversation, steering, notes
        self._log, self._stats = conversation.log, notes.stats
        self._base = len(self._log) - len(said)
        self._options, self._new_text, self._eos = options, text, frozenset(eos)
        self._started, self._on_rollback, self._ended = started, on_rollback, ended
        self._text, self._pieces = text(), list[str]()
        for token, source in said:
            self._told(token, source, True)
        self._had = len(self._log)
        self._runner: Runner | None = None if self._stats.finish else steering.runner(options)
        self._bridge: Bridge | None = None
        self._again = False  # whether the log went on otherwise than the runner made it

    def tokens(self) -> Generator[Token]:
        """The tokens as they are made; to be read once."""
        stats = self._stats
        first = last = self._started
        had = len(stats.tokens)
        stats.reused_tokens = max(0, self._runner.reused()) if self._runner is not None else had
        try:
            while not stats.finish or self._guesses:
                token = self._hear()
                if token is None and stats.finish:
                    break  # nobody is there to confirm the last guesses
                if token is not None and self._guesses and self._confirmed(token):
                    continue
                told = self._guess() if token is None else self._take(token)
                if told is None:
                    continue  # there is nothing to guess with: the cloud is waited for
                last = time.perf_counter()
                first = last if first == self._started else first
                yield told
        finally:
            cancelled = not stats.finish
            stats.finish = stats.finish or "cancelled"
            if len(stats.tokens) > had:
                stats.ttft_ms = (first - self._started) * 1e3
                stats.tok_s = (len(stats.tokens) - had - 1) / (last - first) if last > first else 0.0
            try:
                self._steering.finish(self._runner, stats, 0 if cancelled else len(self._guesses))
            finally:
                if cancelled and self._on_rollback != "keep":
                    self._drop(len(self._log) - self._base)  # who goes on with the answer makes them again, to count
                self._keep()
                stats.text = "".join(self._pieces)
                self._ended(stats.text)

    @property
    def _guesses(self) -> list[int]:
        """What was said beyond the log."""
        return self._stats.tokens[len(self._log) - self._base :]

    @property
    def _guessed(self) -> list[Source]:
        """Where that was made."""
        return self._stats.sources[len(self._log) - self._base :]

    def _hear(self) -> int | None:
        """The next token that counts; None while the cloud is silent and this device can go on without it."""
        stats, steering = self._stats, self._steering
        while True:
            guesses = self._guesses
            self._conversation.check(len(self._log) + len(guesses))
            wanted = self._options.max_tokens - len(stats.tokens) + len(guesses)
            if self._runner is None:
                self._runner = steering.back(self._options, guesses, self._guessed, bool(stats.finish))
                if self._runner is None:
                    return None
            try:
                if self._again:
                    self._again, self._runner = False, steering.again(self._runner, self._options)
                self._runner = steering.turn(self._options, self._runner, guesses, wanted)
                with steering.listening(self._runner, self._options, self._guessed, bool(stats.finish)):
                    token = self._runner.next(self._conversation.remaining(wanted))
                if not self._conversation.speaks(token):
                    raise LinkError(f"the cloud answers nonsense: token {token}", "both sides must be one version")
            except Silent:
                return None
            except GaveUp:
                self._runner = steering.given_up(self._options, self._runner)
                continue
            except IsthmusError as error:
                if not steering.lost(self._options, self._runner, error, len(guesses)):
                    if self._keep() and stats.finish:
                        return None
                    self._runner = steering.alone(self._options, self._runner, error)
                else:
                    self._runner = None
                continue
            if len(self._log) == self._had:  # what the cloud holds is known now
                stats.reused_tokens = max(0, self._runner.reused())
            self._notes.waited()
            self._steering.came(self._runner)
            return token

    def _take(self, token: int) -> Token:
        """A token that counts is the next one."""
        assert self._runner is not None
        self._conversation.extend((token,), self._runner.source)
        return self._told(token, self._runner.source, True)

    def _guess(self) -> Token | None:
        """The next token is this device's guess; None where it cannot make any."""
        self._bridge = self._bridge or self._steering.bridge(self._options)
        if self._bridge is None:
            return None
        try:
            return self._told(self._bridge.say(), self._bridge.source, False)
        except IsthmusError as error:
            self._bridge = None
            self._steering.unbridged(error)
            return None

    def _confirmed(self, token: int) -> bool:
        """Holds the first guess against what counts; whether it stands, because it is right or the caller keeps it."""
        stats, at = self._stats, len(self._log) - self._base
        if stats.tokens[at] == token:
            self._conversation.extend((token,), stats.sources[at])
            return True
        wrong = Rollback(len(self._log), tuple(stats.tokens[at:]), "".join(self._pieces[at:]))
        told = self._on_rollback(wrong) if callable(self._on_rollback) else self._on_rollback
        if not told or told == "keep":
            assert self._runner is not None
            self._steering.stop(self._runner)
            self._keep()
            self._again = not stats.finish
            return True
        stats.replaced += len(wrong.tokens)
        stats.finish = ""
        self._drop(at)
        self._text = self._new_text()
        for known in stats.tokens:
            self._text.push(known)
        return False

    def _drop(self, at: int) -> None:
        """What was said from there on counts no more."""
        del self._stats.tokens[at:], self._stats.sources[at:], self._pieces[at:]

    def _keep(self) -> int:
        """Guesses that nobody confirmed stand; how many."""
        guesses = self._guesses
        self._stats.unverified += len(guesses)
        for token, source in zip(guesses, self._guessed, strict=True):
            self._conversation.extend((token,), source)
        return len(guesses)

    def _told(self, token: int, source: Source, verified: bool) -> Token:
        stats = self._stats
        stats.tokens.append(token)
        stats.sources.append(source)
        piece, finish = "", "eos"
        if token not in self._eos:
            piece = self._text.push(token)
            length = len(stats.tokens) == self._options.max_tokens
            finish = "stop" if self._text.stopped else "length" if length else ""
        if finish:
            piece += self._text.finish()
            stats.finish = finish
        self._pieces.append(piece)
        return Token(token, piece, source, self._base + len(stats.tokens) - 1, finish, verified)
