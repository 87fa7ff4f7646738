"""Entropy coding of small integers: Rice codes with a wider first bucket, whose parameters each channel brings.

A code n is folded to u = 2n for n >= 0, -2n - 1 below. The bucket 0 holds u < 2^first, each further bucket 2^rest
values, where first = ceil(k / 2) and rest = floor(k / 2) for a channel of spread sqrt(2)^k: within 0.1 bits of the
entropy of a normal distribution (Golomb, 1966; Rice and Plaunt, 1971; the wider bucket halves a Rice code's loss at
odd k). A row's stream is all channels' bucket numbers, each as so many zero bits and a one, then all channels' places
within their bucket in `first` or `rest` bits, then zero bits up to a whole byte; most significant bit first.
Bucket `ESCAPE` stands for any u that no other bucket holds, and is followed by u itself in 16 bits.

Integers only, so that all machines agree; both parts are read and written without a loop over channels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import ProtocolError

ESCAPE: Final = 15
MAX_CODE: Final = 32_767
MAX_K: Final = 20
_U16: Final = 16  # bits of an escaped code; with 7 bits before them they lie within four bytes
_MASKS: Final = ((1 << np.arange(_U16 + 1)) - 1).astype(np.int64)


class RowCoder:
    """Codes rows of integers.

    Args:
        spreads: k of each channel in 0..`MAX_K`, where its codes' standard deviation is near sqrt(2)^k: [width].
    """

    def __init__(self, spreads: tuple[int, ...]) -> None:
        k = np.array(spreads, np.int64)
        self.width = len(spreads)
        self._rest, first = k >> 1, 1 << ((k + 1) >> 1)  # bits of a further bucket, values in the first
        self._second = first - (1 << self._rest)  # where the first bucket would begin if it were as narrow
        bits = np.repeat(self._rest[:, None], ESCAPE + 1, axis=1)  # [width, ESCAPE + 1] within each bucket
        bits[:, 0], bits[:, ESCAPE] = (k + 1) >> 1, _U16
        low = first[:, None] + (np.arange(-1, ESCAPE) << self._rest[:, None])  # each bucket's first u
        self._high = low[:, ESCAPE].copy()  # the first u that needs an escape
        low[:, [0, ESCAPE]] = 0
        self._channel = np.arange(self.width, dtype=np.int64)
        self._row = self._channel * (ESCAPE + 1)
        self._bits, self._low = bits.reshape(-1), low.reshape(-1)

    def encode(self, codes: NDArray[np.int64]) -> bytes:
        """The stream of one row.

        Args:
            codes: [width] int64 within +-`MAX_CODE`.
        """
        folded = codes << 1
        folded ^= codes >> 63
        buckets = folded - self._second
        buckets >>= self._rest
        np.maximum(buckets, 0, out=buckets)
        np.minimum(buckets, ESCAPE, out=buckets)
        cell = buckets + self._row
        bits = self._bits[cell]
        ones = buckets.cumsum()
        ones += self._channel
        starts = bits.cumsum()
        unary = int(ones[-1]) + 1
        size = unary + int(starts[-1]) + 7 >> 3
        starts -= bits
        starts += unary
        flags = np.zeros(size << 3, np.uint8)
        flags[ones] = 1
        # No two codes share a bit, so that sums are unions, and exact in float64.
        bits += starts & 7
        words = folded - self._low[cell] << 32 - bits
        parts = np.bincount(starts >> 3, words, size + 1).astype(">u4").view(np.uint8).reshape(-1, 4)
        stream = np.packbits(flags)
        stream |= parts[:size, 0]
        for later in range(1, 4):
            stream[later:] |= parts[: max(0, size - later), later]
        return stream.tobytes()

    def decode(self, stream: bytes | memoryview) -> NDArray[np.int64]:
        """The codes [width] int64 of a stream.

        Raises:
            ProtocolError: not a stream that `encode` writes.
        """
        size = len(stream)
        if size > max_bytes(self.width):
            raise ProtocolError(f"a row's stream has {size} bytes", f"send at most {max_bytes(self.width)}")
        padded = bytes(stream) + bytes(4)
        flags = np.unpackbits(np.frombuffer(padded, np.uint8)).view(np.bool_)
        ones = flags[: self.width * (ESCAPE + 1)].nonzero()[0][: self.width]
        buckets = ones.copy()
        buckets[1:] -= ones[:-1] + 1
        last = int(buckets.max(initial=0))
        if len(ones) < self.width or last > ESCAPE:
            raise ProtocolError(f"a row's stream of {size} bytes does not name {self.width} buckets", _BROKEN)
        cell = self._row + buckets
        bits = self._bits[cell]
        ends = bits.cumsum()
        ends += int(ones[-1]) + 1
        total = int(ends[-1])
        if total + 7 >> 3 != size:
            raise ProtocolError(f"a row's stream has {size} bytes where its codes take {total} bits", _BROKEN)
        starts = ends - bits
        places = np.ndarray(size + 1, ">u4", padded, 0, (1,))  # the four bytes from each byte on
        folded = (places[starts >> 3] >> 32 - bits - (starts & 7)) & _MASKS[bits]
        if total & 7 and padded[size - 1] & 0xFF >> (total & 7):
            raise ProtocolError("bits after a row's last code are not zero", _BROKEN)
        folded += self._low[cell]
        if last == ESCAPE:
            escaped = folded[buckets == ESCAPE]
            if int(escaped.max()) > 2 * MAX_CODE or (escaped < self._high[buckets == ESCAPE]).any():
                raise ProtocolError("a code is escaped without need or out of range", _BROKEN)
        codes: NDArray[np.int64] = folded >> 1 ^ -(folded & 1)
        return codes


_BROKEN = "the sender's result is broken or truncated"


def max_bytes(width: int) -> int:
    """The longest stream of a row of so many codes: all of them escaped."""
    return (width * (ESCAPE + 1 + _U16) + 7) // 8
