"""What a language model takes on one machine, as a file that may be copied from there, for a device or for a cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from isthmus.edge.figures import CloudFigures, DeviceFigures, Points
from isthmus.edge.priors import CODEC_MS, PREFILL_SHARE, sizes
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.files import write_whole
from isthmus.split.link import Served
from isthmus.split.profile import MOST_THREADS, load

VERSION = 1
COLD_MS = 10.0  # the pause after which parts of a model are timed, too
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
        exits_ms: (k, ms) of the exit before layer k for one token, its output head included.
        rests_ms: (k, ms) of one token through layers [k, all) and the output head, as a cloud computes it.
        layers_cold_ms, exits_cold_ms, rests_cold_ms: the same after a pause of `COLD_MS`; after another one it lies
            between as far as `apart` does.
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
    exits_ms: Points = ()
    rests_ms: Points = ()
    layers_cold_ms: Points = ()
    exits_cold_ms: Points = ()
    rests_cold_ms: Points = ()
    format: Literal["isthmus-decoder-profile"] = "isthmus-decoder-profile"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise PlanError(f"the profile has version {self.version}, this isthmus reads {VERSION}", _AGAIN)
        parts = (
            (self.layers_ms, self.layers_cold_ms),
            (self.exits_ms, self.exits_cold_ms),
            (self.rests_ms, self.rests_cold_ms),
        )
        points = (*self.rows_ms, *(point for part in parts for times in part for point in times))
        if not self.layers_ms or not self.rows_ms or any(not (n >= 1 and 0 < ms < 1e9) for n, ms in points):
            raise PlanError("the profile has a time that is none", _AGAIN)
        for warm, cold in parts:
            if cold and [k for k, _ in cold] != [k for k, _ in warm]:
                raise PlanError("the profile's times after pauses are of other layers", _AGAIN)
        for layers in ([k for k, _ in self.exits_ms], [k for k, _ in self.rests_ms]):
            if layers != sorted(set(layers)) or any(k >= self.n_layers for k in layers):
                raise PlanError("the profile's times are of layers that there are not", _AGAIN)
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

    def device(self, held: int, pause_ms: float = 0.0) -> DeviceFigures:
        """It as a device that holds so many layers.

        Args:
            pause_ms: before each token.
        """
        layers = self._after(self.layers_ms, self.layers_cold_ms, pause_ms)
        exits = self._after(self.exits_ms, self.exits_cold_ms, pause_ms)
        times = layers, self.slower(pause_ms) * self.head_ms, layers[-1][1] / self.n_layers, self.prefill_row_ms
        return DeviceFigures(held, self.n_layers, *times, CODEC_MS, exits)

    def cloud(self, times: float = 1.0, pause_ms: float = 0.0) -> CloudFigures:
        """It as a cloud, so many times as fast.

        Args:
            pause_ms: before each step; one of several rows takes as much longer as one of one does, as weights are read
                once for all of them.
        """
        slower = self.slower(pause_ms)
        more_ms = (slower - 1.0) * self.rows_ms[0][1]
        rows = tuple((n, (ms + more_ms) / times) for n, ms in self.rows_ms)
        rests = tuple((k, ms / times) for k, ms in self._after(self.rests_ms, self.rests_cold_ms, pause_ms))
        fixed = slower * self.head_ms / times, self.prefill_row_ms / times
        return CloudFigures(self.n_layers, rows, *fixed, rests_ms=rests)

    def _after(self, warm: Points, cold: Points, pause_ms: float) -> Points:
        """Times after a pause: between those without one and those after `COLD_MS` as far as the whole model's are."""
        slower, then = self.slower(pause_ms), self.slower(COLD_MS)
        if not cold:
            return tuple((k, slower * ms) for k, ms in warm)
        share = min(1.0, (slower - 1.0) / (then - 1.0) if then > 1.0 else pause_ms / COLD_MS)
        return tuple((k, a + share * max(0.0, b - a)) for (k, a), (_, b) in zip(warm, cold, strict=True))

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
