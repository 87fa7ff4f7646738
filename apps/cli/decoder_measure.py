"""Times a language model on this machine: layers, head, exits, several rows at once, a prompt, and after pauses."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray

from isthmus.apps.cli.decoder_profile import COLD_MS, DecoderProfile
from isthmus.edge.figures import Points
from isthmus.engine import KvConfig, Rows, Want, open_part
from isthmus.engine.part import Part, StepResult
from isthmus.split.bundle import Bundle

ROWS = (1, 2, 4, 8)  # of steps that give as many tokens
PAUSES_MS = (3, 10, 30)  # as those in which one side waits for the other
PROMPT, CHUNK = 128, 64  # rows that are held while steps are timed, and of a prompt's step
WARM, LEAST = 2, 8  # steps that are not counted, and that are
LEAST_MS = 1e-3  # of an exit
STATES = 16  # that the rest of a model is timed with
KV = KvConfig("f16", 1024)


def measure(
    bundle: Bundle,
    threads: int,
    machine: str,
    processor: str,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> DecoderProfile:
    """Times a model here.

    Args:
        threads: of the engine.
        machine, processor: in words, for the profile.
        seconds: that it takes, about.
        clock, sleep: seconds.

    Raises:
        EngineError: nothing runs it here.
        BundleError: a file of the model or of an exit is absent or damaged.
    """
    n_layers = bundle.config.n_layers
    exits = sorted(one.layer for one in bundle.exits if bundle.holds(one.file))
    cuts = sorted({1, n_layers // 4, n_layers // 2, 3 * n_layers // 4, *exits} - {0, n_layers})
    depths = (*cuts, n_layers)
    each_s = seconds / (2 * (len(depths) + len(exits) + len(cuts)) + len(ROWS) + 1 + len(PAUSES_MS))
    with ExitStack() as opened:
        part = opened.enter_context(closing(open_part(bundle, 0, n_layers, threads=threads, kv=KV)))
        one = opened.enter_context(_Timed(bundle, part, threads, each_s, clock, sleep))
        rows_ms = _rising([(count, one.rows_ms(count)) for count in ROWS])
        warm, cold = (
            (
                layers := _rising([(depth, one.layers_ms(depth, pause_ms)) for depth in depths]),
                tuple((at, max(LEAST_MS, one.drafted_ms(at, pause_ms) - dict(layers)[at])) for at in exits),
                _falling([(layer, one.rest_ms(layer, pause_ms)) for layer in cuts]),
            )
            for pause_ms in (0.0, COLD_MS)
        )
        return DecoderProfile(
            bundle.manifest.model_id,
            bundle.manifest.name,
            part.numerics.id,
            machine,
            processor,
            threads,
            warm[0],
            rows_ms,
            one.prompt_ms() / CHUNK,
            _rising([(pause, max(1.0, one.rows_ms(1, pause) / rows_ms[0][1])) for pause in PAUSES_MS]),
            *warm[1:],
            *cold,
        )


class _Timed:
    """Steps behind a prompt, each done again and again with other tokens; medians in ms.

    Args:
        each_s: for each kind of step.
    """

    def __init__(
        self,
        bundle: Bundle,
        part: Part,
        threads: int,
        each_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._bundle, self._part, self._threads, self._each_s = bundle, part, threads, each_s
        self._clock, self._sleep = clock, sleep
        self._chance, self._most = random.Random(0), bundle.config.vocab_size
        self._sequence = part.open()
        part.step(Rows().tokens(self._sequence, 0, self._said(PROMPT), want=Want.NONE))

    def __enter__(self) -> _Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self._sequence.close()

    def layers_ms(self, depth: int, pause_ms: float = 0.0) -> float:
        """Of one token through layers [0, depth), after a pause."""
        return self._ms(lambda said: self._tokens(said, depth, Want.HIDDEN), 1, pause_ms)

    def rows_ms(self, count: int, pause_ms: float = 0.0) -> float:
        """Of the whole model for so many tokens, after a pause."""
        return self._ms(lambda said: self._tokens(said, None, Want.SAMPLE), count, pause_ms)

    def prompt_ms(self) -> float:
        """Of `CHUNK` tokens of a prompt."""
        return self._ms(lambda said: self._tokens(said, None, Want.NONE), CHUNK)

    def rest_ms(self, layer: int, pause_ms: float = 0.0) -> float:
        """Of one token through layers [layer, all) and the output head, after a pause."""
        states = [self._states([said], layer) for said in self._said(STATES)]
        self._sequence.truncate(PROMPT)
        return self._ms(
            lambda said: self._part.step(
                Rows().hidden(self._sequence, PROMPT, states[said[0] % STATES], enter=layer, want=Want.SAMPLE)
            ),
            1,
            pause_ms,
        )

    def drafted_ms(self, layer: int, pause_ms: float = 0.0) -> float:
        """Of one token through layers [0, layer) and the exit there, after a pause."""
        head = open_part(self._bundle.exit(layer), layer, layer + 1, threads=self._threads, kv=KV)
        with closing(head), closing(head.open()) as sequence:
            states = self._states(self._said(PROMPT), layer)
            head.step(Rows().hidden(sequence, 0, states, enter=layer, want=Want.NONE))

            def drafted(said: list[int]) -> None:
                hidden, want = self._tokens(said, layer, Want.HIDDEN).hidden, Want.SAMPLE | Want.CONFIDENCE
                head.step(Rows().hidden(sequence, PROMPT, hidden, enter=layer, want=want))
                sequence.truncate(PROMPT)

            return self._ms(drafted, 1, pause_ms)

    def _said(self, count: int) -> list[int]:
        """Tokens of many kinds, which go to many experts."""
        return [self._chance.randrange(self._most) for _ in range(count)]

    def _states(self, said: list[int], layer: int) -> NDArray[np.float32]:
        """Of tokens behind the prompt before a layer: [n, d_model] f32."""
        self._sequence.truncate(PROMPT)
        return self._tokens(said, layer, Want.HIDDEN).hidden

    def _tokens(self, said: list[int], leave: int | None, want: Want) -> StepResult:
        rows = Rows().tokens(self._sequence, PROMPT, said, leave=leave, want=want, want_all=want is not Want.NONE)
        return self._part.step(rows)

    def _ms(self, step: Callable[[list[int]], object], count: int, pause_ms: float = 0.0) -> float:
        self._sequence.truncate(PROMPT)
        took, began = list[float](), self._clock()
        while len(took) < WARM + LEAST or self._clock() - began < self._each_s:
            said = self._said(count)
            if pause_ms:
                self._sleep(pause_ms * 1e-3)
            start = self._clock()
            step(said)
            took.append((self._clock() - start) * 1e3)
            self._sequence.truncate(PROMPT)
        return statistics.median(took[WARM:])


def _rising(points: Sequence[tuple[int, float]]) -> Points:
    """Times that do not fall where more is computed, or after longer pauses, as noise may have it."""
    found, least = list[tuple[int, float]](), 0.0
    for count, ms in points:
        least = max(least, ms)
        found.append((count, least))
    return tuple(found)


def _falling(points: Sequence[tuple[int, float]]) -> Points:
    """Times that do not rise where less is computed."""
    found = _rising([(-layer, ms) for layer, ms in reversed(points)])
    return tuple((-layer, ms) for layer, ms in reversed(found))
