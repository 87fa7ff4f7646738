"""What both sides know of a boundary's channels: around what they lie and how far they spread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.entropy import MAX_K, RowCoder
from isthmus.protocol.errors import ProtocolError

DIGEST_BYTES = 8
MIN_ROWS = 16
SPREAD_MIN, SPREAD_MAX, MEAN_MAX = 2.0**-40, 2.0**40, 2.0**60
_OUTLIER = 8.0  # rows of so many times the median norm, such as attention sinks, would widen the spreads
_DEVIATIONS = 1.2533141373155003  # sqrt(pi / 2): a normal distribution's standard over its mean absolute deviation


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Statistics of the channels of hidden states before a layer, equal on both sides.

    Attributes:
        mean: [d_model] f32.
        spread: [d_model] f32, about a standard deviation; within 2^-40..2^40.
        inverse: [d_model] f32, 1 / spread.
        digest: names them, 8 bytes of BLAKE2b over both as little-endian bytes, mean first.
        unit: the lower median of the spreads, which steps are measured by.

    Raises:
        ProtocolError: shapes differ, or a value is not in range.
    """

    mean: NDArray[np.float32]
    spread: NDArray[np.float32]
    inverse: NDArray[np.float32] = field(init=False)
    digest: bytes = field(init=False)
    unit: float = field(init=False)
    _coders: dict[int, RowCoder] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mean", "spread"):
            given = np.array(getattr(self, name), "<f4")
            given.flags.writeable = False
            object.__setattr__(self, name, given)
        if self.mean.ndim != 1 or not len(self.mean) or self.mean.shape != self.spread.shape:
            raise ProtocolError(
                f"channel statistics have shapes {self.mean.shape} and {self.spread.shape}", "give both as [d_model]"
            )
        if not ((self.spread >= SPREAD_MIN) & (self.spread <= SPREAD_MAX) & (np.abs(self.mean) <= MEAN_MAX)).all():
            raise ProtocolError("a channel's mean or spread is not in range", "collect the statistics again")
        data = self.mean.tobytes() + self.spread.tobytes()
        object.__setattr__(self, "digest", hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest())
        object.__setattr__(self, "inverse", 1.0 / self.spread)
        object.__setattr__(self, "unit", float(np.sort(self.spread)[(len(self.spread) - 1) // 2]))

    @property
    def width(self) -> int:
        """d_model."""
        return len(self.mean)

    @classmethod
    def of(cls, states: NDArray[np.float32] | NDArray[np.float16]) -> ChannelStats:
        """The statistics of states [rows, d_model] before one layer, without the first position of each sequence.

        Raises:
            ProtocolError: too few rows, or not finite.
        """
        if states.ndim != 2 or len(states) < MIN_ROWS:
            raise ProtocolError(f"states of shape {list(states.shape)}", f"give at least {MIN_ROWS} rows")
        rows = states.astype(np.float64)
        norms = np.sqrt((rows * rows).sum(axis=1))
        rows = rows[norms <= _OUTLIER * np.median(norms)]
        if not len(rows) or not np.isfinite(norms).all():
            raise ProtocolError("a hidden state is not finite", "collect the states again")
        mean = rows.mean(axis=0)
        spread = np.abs(rows - mean).mean(axis=0) * _DEVIATIONS
        return cls(mean.astype(np.float32), np.maximum(spread, SPREAD_MIN).astype(np.float32))

    def spreads(self, steps: int) -> tuple[int, ...]:
        """k of each channel, sqrt(2)^k being near its spread in steps of unit / `steps`.

        Odd k serve log2 of the spread from 0.16 to 0.75 above a whole number, where their codes are shorter. Every
        operation is correctly rounded, so that both sides agree.
        """
        ratio = self.spread.astype(np.float64) * steps / self.unit
        mantissa, exponent = np.frexp(ratio * ratio)  # the square is 2 mantissa * 2^(exponent - 1)
        k = exponent - 1
        k += np.where(k & 1, mantissa >= 45 / 64, mantissa >= 5 / 8)
        return tuple(np.clip(k, 0, MAX_K).tolist())

    def coder(self, steps: int) -> RowCoder:
        """The entropy coder for codes in steps of unit / `steps`, made once."""
        found = self._coders.get(steps)
        if found is None:
            found = self._coders[steps] = RowCoder(self.spreads(steps))
        return found
