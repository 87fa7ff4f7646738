"""What a language model takes on one machine, as a file that may be copied from there, for a device or for a cloud."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from isthmus.edge.figures import CloudFigures, DeviceFigures, Points
from isthmus.edge.priors import CODEC_MS, PREFILL_SHARE, sizes
from isthmus.engine import KvConfig, Rows, Want, open_part
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.files import write_whole
from isthmus.split.link import Served
from isthmus.split.profile import MOST_THREADS, load

VERSION = 1
ROWS = (1, 2, 4, 8)  # of steps that give as many tokens
PAUSES_MS = (3, 10, 30)  # as those in which one side waits for the other
PROMPT, CHUNK = 128, 64  # rows that are held while steps are timed, and of a prompt's step
WARM, LEAST = 2, 8  # steps that are not counted, and that are
OF_ITSELF = "the one at the link's other end"  # a processor
_AGAIN = "measure it again: isthmus profile"


class DecoderProfile(msgspec.Struct, frozen=True):
    """See the module; times are milliseconds.

    Attributes:
        model: the bundle's model_id.
        numerics, machine, processor: what ran it, on what.
        threads: that ran it.
        layers_ms: (k, ms) of one token through layers [0, k).
        rows_ms: (n, ms) of a step of n rows through the whole model that gives n tokens.
        prefill_row_ms: of one row of a prompt.
        apart: (pause in ms, how many times as long a token takes after it), as caches and clocks forget; ascending,
            empty where that was not measured.
    """

    model: str
    name: str
    numerics: str
    machine: str
    processor: str
    threads: int
    layers_ms: Points
    rows_ms: Points
    prefill_row_ms: float
    apart: Points = ()
    format: Literal["isthmus-decoder-profile"] = "isthmus-decoder-profile"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise PlanError(f"the profile has version {self.version}, this isthmus reads {VERSION}", _AGAIN)
        points = (*self.layers_ms, *self.rows_ms)
        if not self.layers_ms or not self.rows_ms or any(not (n >= 1 and 0 < ms < 1e9) for n, ms in points):
            raise PlanError("the profile has a time that is none", _AGAIN)
        for counts in ([n for n, _ in self.layers_ms], [n for n, _ in self.rows_ms]):
            if counts != sorted(set(counts)) or counts[0] != 1:
                raise PlanError("the profile's times are not in order", _AGAIN)
        pauses = [pause for pause, _ in self.apart]
        if pauses != sorted(set(pauses)) or any(not (n > 0 and 1 <= times < 1e6) for n, times in self.apart):
            raise PlanError("the profile's times after pauses are none", _AGAIN)
        if not 0 < self.prefill_row_ms < 1e9 or not 1 <= self.threads <= MOST_THREADS:
            raise PlanError("the profile has a time that is none", _AGAIN)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.layers_ms[-1][0]

    @property
    def head_ms(self) -> float:
        """Of the output head, for one token."""
        return max(0.0, self.rows_ms[0][1] - self.layers_ms[-1][1])

    def slower(self, pause_ms: float) -> float:
        """How many times as long a token takes after a pause as without one."""
        pauses, times = zip((0.0, 1.0), *self.apart, strict=True)
        return float(np.interp(pause_ms, pauses, times))

    def device(self, held: int, slower: float = 1.0) -> DeviceFigures:
        """It as a device that holds so many layers, whose tokens take so many times as long."""
        layers = tuple((k, slower * ms) for k, ms in self.layers_ms)
        times = layers, slower * self.head_ms, layers[-1][1] / self.n_layers, self.prefill_row_ms
        return DeviceFigures(held, self.n_layers, *times, CODEC_MS)

    def cloud(self, times: float = 1.0, slower: float = 1.0) -> CloudFigures:
        """It as a cloud, so many times as fast, where a step of one row takes so many times as long; one of more takes
        as much longer, as weights are read once for all of them.
        """
        more_ms = (slower - 1.0) * self.rows_ms[0][1]
        rows = tuple((n, (ms + more_ms) / times) for n, ms in self.rows_ms)
        return CloudFigures(self.n_layers, rows, slower * self.head_ms / times, self.prefill_row_ms / times)

    @classmethod
    def of_cloud(cls, bundle: Bundle, served: Served) -> DecoderProfile:
        """Of a cloud that says what its steps take: layers share what the output head leaves, as their bytes do.

        Raises:
            PlanError: the cloud says times that are none.
        """
        known, step_ms = sizes(bundle), served.rows_ms[0][1]
        body_ms = step_ms * (1.0 - known.head / known.of(known.n_layers, True))
        layers = tuple((k, body_ms * k / known.n_layers) for k in sorted({1, known.n_layers}))
        prefill_ms = served.prefill_row_ms or PREFILL_SHARE * step_ms
        where = ("", "", OF_ITSELF, 1)  # it does not say how many threads
        return cls(served.model, served.name, *where, layers, served.rows_ms, prefill_ms)

    def save(self, path: Path) -> None:
        """Writes it, as JSON for people to read as well."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def load_decoder_profile(path: Path) -> DecoderProfile:
    """A profile from a file.

    Raises:
        PlanError: it cannot be read, holds none, or one of another version.
    """
    return load(path, DecoderProfile, "profile of a language model", _AGAIN)


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
    part = open_part(bundle, 0, n_layers, threads=threads, kv=KvConfig("f16", 1024))
    depths = sorted(
        {1, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers, *(one.layer for one in bundle.exits)}
    )
    depths = [depth for depth in depths if depth >= 1]
    each_s = seconds / (len(depths) + len(ROWS) + len(PAUSES_MS) + 1)
    chance = random.Random(0)  # tokens of one kind would all go to the same experts
    said = [chance.randrange(bundle.config.vocab_size) for _ in range(PROMPT + max(CHUNK, *ROWS))]

    def step_ms(count: int, leave: int | None, want: Want, pause_ms: float = 0.0) -> float:
        sequence = part.open()
        try:
            part.step(Rows().tokens(sequence, 0, said[:PROMPT], want=Want.NONE))
            took, began = list[float](), clock()
            while len(took) < WARM + LEAST or clock() - began < each_s:
                if pause_ms:
                    sleep(pause_ms * 1e-3)
                start = clock()
                more = said[PROMPT : PROMPT + count]
                rows = Rows().tokens(sequence, PROMPT, more, leave=leave, want=want, want_all=want is not Want.NONE)
                part.step(rows)
                took.append((clock() - start) * 1e3)
                sequence.truncate(PROMPT)
            return statistics.median(took[WARM:])
        finally:
            sequence.close()

    try:
        layers_ms = tuple((depth, step_ms(1, depth, Want.HIDDEN)) for depth in depths)
        rows_ms = tuple((count, step_ms(count, None, Want.SAMPLE)) for count in ROWS)
        prefill_row_ms = step_ms(CHUNK, None, Want.NONE) / CHUNK
        alone_ms = rows_ms[0][1]
        apart = tuple((pause, max(1.0, step_ms(1, None, Want.SAMPLE, pause) / alone_ms)) for pause in PAUSES_MS)
        manifest = bundle.manifest
        return DecoderProfile(
            manifest.model_id,
            manifest.name,
            part.numerics.id,
            machine,
            processor,
            threads,
            _rising(layers_ms),
            _rising(rows_ms),
            prefill_row_ms,
            _rising(apart),
        )
    finally:
        part.close()


def _rising(points: Points) -> Points:
    """Times that do not fall where more is computed, or after longer pauses, as noise may have it."""
    found, least = list[tuple[int, float]](), 0.0
    for count, ms in points:
        least = max(least, ms)
        found.append((count, least))
    return tuple(found)
