"""An exit for devices with toy parts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import numpy as np

from isthmus.edge.exit import ExitSpeaker
from isthmus.engine.part import Rows, StepResult, Want
from isthmus.engine.sampling import Sampling
from isthmus.engine.threshold import least
from isthmus.protocol.chain import Chain
from isthmus.protocol.channels import ChannelStats
from tests.edge_toys import device
from tests.edge_world import LossyWire
from tests.toy_part import D_MODEL, VOCAB, ToyPart, ToySequence

CUT = 3


class ToyExit:
    """An exit that runs the rest of the toy, is often right, and is as sure as a hash of the state says."""

    def __init__(self) -> None:
        self.part = ToyPart()
        self.start, self.end, self.config = CUT, CUT + 1, self.part.config

    def open(self) -> ToySequence:
        return self.part.open()

    def step(self, rows: Rows) -> StepResult:
        (span,) = rows.spans
        assert span.hidden_in is not None
        wanted = span.want
        span.want = int(Want.SAMPLE)
        tokens = self.part.step(rows).tokens
        if not wanted & Want.SAMPLE:
            return StepResult([], np.zeros((0, D_MODEL), np.float32), np.zeros((0, VOCAB), np.float32))
        assert wanted & Want.CONFIDENCE
        last = (span.position + len(span) - 1) % 256
        digest = blake2b(span.hidden_in[-1].tobytes() + bytes([last]), digest_size=2).digest()
        guess = tokens[-1] if digest[0] < 150 else (tokens[-1] + 1) % 256
        empty = np.zeros((0, D_MODEL), np.float32)
        return StepResult([guess], empty, empty, np.array([digest[1] / 255], np.float32))

    def close(self) -> None:
        pass


class Oracle:
    """What the model and the exit say after a log, each asked about every token."""

    def __init__(self) -> None:
        self._whole, self._lower, self._exit = ToyPart(), ToyPart(), ToyExit()
        self._sequences = self._whole.open(), self._lower.open(), self._exit.open()
        self._log = Chain()
        self._known: dict[tuple[bytes, Sampling], tuple[int, int, float]] = {}

    def after(self, tokens: Sequence[int], sampling: Sampling, threshold: float | None = None) -> int:
        """What comes next: the exit's choice where it is as sure as that, else the model's."""
        log = Chain()
        log.extend(tokens)
        key = log.head, sampling
        if key not in self._known:
            self._known[key] = self._ask(log, sampling)
        token, guess, confidence = self._known[key]
        return token if threshold is None or confidence < least(threshold) else guess

    def _ask(self, log: Chain, sampling: Sampling) -> tuple[int, int, float]:
        at = min(self._log.common(log), len(log) - 1)
        for sequence in self._sequences:
            sequence.truncate(at)
        self._log.truncate(at)
        whole, lower, exits = self._sequences
        feed = log.tokens[at:]
        token = self._whole.step(Rows().tokens(whole, at, feed, want=Want.SAMPLE, sampling=sampling)).tokens[0]
        states = self._lower.step(Rows().tokens(lower, at, feed, leave=CUT, want=Want.HIDDEN, want_all=True)).hidden
        want = Want.SAMPLE | Want.CONFIDENCE
        said = self._exit.step(Rows().hidden(exits, at, states, enter=CUT, want=want, sampling=sampling))
        self._log.extend(feed)
        return token, said.tokens[0], float(said.confidence[0])


def give_exit(one: Any) -> None:
    """A device with toy parts gets a toy exit."""
    one._bundle.exits = one._bundle.exits or (SimpleNamespace(layer=CUT, file=""),)
    one._exits.layer = lambda wanted: CUT
    speakers: dict[int, ExitSpeaker] = {}
    one._exits.stats = lambda layer: ChannelStats(np.zeros(D_MODEL, np.float32), np.ones(D_MODEL, np.float32))

    def speaker(layer: int) -> ExitSpeaker:
        part = one._holding.open(layer)
        if layer not in speakers:
            speakers[layer] = one._exits._open[layer] = ExitSpeaker(part, ToyExit(), layer)  # type: ignore[arg-type]
        return speakers[layer]

    one._exits.speaker = speaker


def exiting(wire: LossyWire, threshold: float = 0.6, guesses: int | None = None, **options: Any) -> Any:
    """A device in exit mode, with toy parts and a toy exit."""
    one: Any = device(wire, "exit", threshold=threshold, guesses=guesses, codec="f32", **options)
    one._exits.layer = lambda wanted: CUT
    give_exit(one)
    return one
