"""Times a language model on this machine: layers, head, exits, several rows at once, a prompt, and after pauses."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import numpy as np

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
    """Times a model here, for about so many seconds in all.

    Raises:
        EngineError: nothing runs it here.
        BundleError: a file is absent or damaged.
    """
    n_layers = bundle.config.n_layers
    exits = sorted(one.layer for one in bundle.exits if bundle.holds(one.file))
    cuts = sorted({1, n_layers // 4, n_layers // 2, 3 * n_layers // 4, *exits} - {0, n_layers})
    depths = (*cuts, n_layers)
    each_s = seconds / (2 * (len(depths) + len(cuts)) + len(ROWS) + 1 + len(PAUSES_MS) + len(exits))
    with ExitStack() as opened:
        part = opened.enter_context(closing(open_part(bundle, 0, n_layers, threads=threads, kv=KV)))
        one = opened.enter_context(_Timed(bundle, part, threads, each_s, clock, sleep))
        layers_ms = _rising([(depth, one.layers_ms(depth)) for depth in depths])
        rows_ms = _rising([(count, one.rows_ms(count)) for count in ROWS])
        through, token_ms = dict(layers_ms), rows_ms[0][1]
        return DecoderProfile(
            bundle.manifest.model_id,
            bundle.manifest.name,
            part.numerics.id,
            machine,
            processor,
            threads,
            layers_ms,
            rows_ms,
            one.prompt_ms() / CHUNK,
            _rising([(pause, max(1.0, one.rows_ms(1, pause) / token_ms)) for pause in PAUSES_MS]),
            tuple((layer, max(LEAST_MS, one.word_ms(layer) - through[layer])) for layer in exits),
            tuple((layer, one.rest_ms(layer)) for layer in cuts),
            _rising([(depth, one.layers_ms(depth, COLD_MS)) for depth in depths]),
            tuple((layer, one.rest_ms(layer, COLD_MS)) for layer in cuts),
        )


class _Timed:
    """Steps behind a prompt, each done again and again; medians in ms.

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
        chance = random.Random(0)  # tokens of one kind would all go to the same experts
        self._said = [chance.randrange(bundle.config.vocab_size) for _ in range(PROMPT + max(CHUNK, *ROWS))]
        self._states = np.random.default_rng(0).standard_normal((PROMPT, bundle.config.d_model)).astype(np.float32)
        self._sequence = part.open()
        part.step(Rows().tokens(self._sequence, 0, self._said[:PROMPT], want=Want.NONE))

    def __enter__(self) -> _Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self._sequence.close()

    def layers_ms(self, depth: int, pause_ms: float = 0.0) -> float:
        """Of one token through layers [0, depth), after a pause."""
        return self._ms(lambda: self._tokens(1, depth, Want.HIDDEN), pause_ms)

    def rows_ms(self, count: int, pause_ms: float = 0.0) -> float:
        """Of the whole model for so many tokens, after a pause."""
        return self._ms(lambda: self._tokens(count, None, Want.SAMPLE), pause_ms)

    def prompt_ms(self) -> float:
        """Of `CHUNK` tokens of a prompt."""
        return self._ms(lambda: self._tokens(CHUNK, None, Want.NONE))

    def rest_ms(self, layer: int, pause_ms: float = 0.0) -> float:
        """Of one token through layers [layer, all) and the output head, after a pause."""

        def rest() -> None:
            self._part.step(Rows().hidden(self._sequence, PROMPT, self._states[:1], enter=layer))

        return self._ms(rest, pause_ms)

    def word_ms(self, layer: int) -> float:
        """Of one token through layers [0, layer) and the exit there."""
        head = open_part(self._bundle.exit(layer), layer, layer + 1, threads=self._threads, kv=KV)
        with closing(head), closing(head.open()) as sequence:
            head.step(Rows().hidden(sequence, 0, self._states, enter=layer, want=Want.NONE))

            def word() -> None:
                hidden = self._tokens(1, layer, Want.HIDDEN).hidden
                head.step(Rows().hidden(sequence, PROMPT, hidden, enter=layer, want=Want.SAMPLE | Want.CONFIDENCE))
                sequence.truncate(PROMPT)

            return self._ms(word)

    def _tokens(self, count: int, leave: int | None, want: Want) -> StepResult:
        said = self._said[PROMPT : PROMPT + count]
        rows = Rows().tokens(self._sequence, PROMPT, said, leave=leave, want=want, want_all=want is not Want.NONE)
        return self._part.step(rows)

    def _ms(self, step: Callable[[], object], pause_ms: float = 0.0) -> float:
        took, began = list[float](), self._clock()
        while len(took) < WARM + LEAST or self._clock() - began < self._each_s:
            if pause_ms:
                self._sleep(pause_ms * 1e-3)
            start = self._clock()
            step()
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
