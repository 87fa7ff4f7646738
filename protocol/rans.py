"""Entropy coding of small whole numbers by their frequencies: range asymmetric numeral systems (Duda, 2013).

Four coders share the symbols in turn: symbol i belongs to coder i mod 4. A coder's state x lies in [2^16, 2^32); the
frequencies f of all symbols are whole numbers whose sum is 2^12, and c is the sum of those of lower symbols. To read a
symbol:

    slot = x mod 2^12;  s = the symbol with c(s) <= slot < c(s) + f(s)
    x = f(s) * floor(x / 2^12) + slot - c(s);  if x < 2^16: x = x * 2^16 + the next word

Written is from the last symbol to the first, so that it is read from the first to the last; every coder begins
writing, and ends reading, at x = 2^16. A stream is the four states as u32, then the words as u16, little-endian.

All is whole numbers below 2^32, so that any language reads it. The compiled module does the same many times faster.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import ProtocolError

LANES: Final = 4
BITS: Final = 12
TOTAL: Final = 1 << BITS  # sum of all frequencies
LEAST: Final = 1 << 16
MAX_SYMBOLS: Final = 256
STATES_BYTES: Final = 4 * LANES
Codes = NDArray[np.uint8]
Frequencies = NDArray[np.uint16]
_U16, _U32 = np.dtype("<u2"), np.dtype("<u4")


def native() -> Any:
    """The compiled module; None where it was not built."""
    try:
        from isthmus.protocol import _rans
    except ImportError:
        return None
    return _rans


def frequencies(counts: NDArray[np.int64]) -> Frequencies:
    """Frequencies [symbols] of a sum of `TOTAL`, near the shares of counts; a symbol that was seen has at least 1.

    Args:
        counts: [symbols], of at most `MAX_SYMBOLS`; not all 0.
    """
    exact = counts * (TOTAL / counts.sum())
    found = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (rest := TOTAL - int(found.sum())) > 0:
        gains = np.where(counts > 0, exact - found, -np.inf)
        found[np.argsort(-gains, kind="stable")[: min(rest, int((counts > 0).sum()))]] += 1
    while int(found.sum()) > TOTAL:
        costs = np.where(found > 1, counts / np.maximum(found - 1, 1), np.inf)  # of a symbol that becomes rarer
        found[np.argmin(costs)] -= 1
    return found.astype(np.uint16)


def encode(codes: Codes, table: Frequencies) -> bytes:
    """The stream of codes [n].

    Raises:
        ProtocolError: a code whose frequency is 0, or that has none.
    """
    if not np.pad(table, (0, MAX_SYMBOLS - len(table))).astype(bool)[codes].all():
        raise ProtocolError("a code has no frequency", "count the codes that are to be written")
    module = native()
    if module is None:
        return _encode(codes, table)
    words, states = np.empty(len(codes), np.uint16), np.empty(LANES, np.uint32)
    ffi, lib = module.ffi, module.lib
    count = lib.ir_encode(
        ffi.from_buffer("uint8_t[]", codes),
        len(codes),
        ffi.from_buffer("uint16_t[]", table),
        len(table),
        ffi.from_buffer("uint16_t[]", words),
        ffi.from_buffer("uint32_t[]", states),
    )
    return states.astype(_U32).tobytes() + words[len(codes) - count :].astype(_U16).tobytes()


def decode(stream: memoryview, table: Frequencies, count: int) -> Codes:
    """The codes [count] of a stream.

    Raises:
        ProtocolError: not a stream that `encode` writes with these frequencies.
    """
    if int(table.sum(dtype=np.int64)) != TOTAL or len(table) > MAX_SYMBOLS:
        raise ProtocolError(f"frequencies of a sum of {int(table.sum(dtype=np.int64))}, not {TOTAL}", _BROKEN)
    size = len(stream) - STATES_BYTES
    if size < 0 or size % 2 or size // 2 > count:
        raise ProtocolError(f"{len(stream)} bytes for {count} coded values", _BROKEN)
    states = np.frombuffer(stream, _U32, LANES).astype(np.uint32)
    words = np.frombuffer(stream, _U16, size // 2, STATES_BYTES).astype(np.uint16)
    module = native()
    if module is None:
        return _decode(states, words, table, count)
    codes, ffi = np.empty(count, np.uint8), module.ffi
    wrong = module.lib.ir_decode(
        ffi.from_buffer("uint16_t[]", words),
        len(words),
        ffi.from_buffer("uint32_t[]", states),
        ffi.from_buffer("uint16_t[]", table),
        len(table),
        ffi.from_buffer("uint8_t[]", codes, require_writable=True),
        count,
    )
    if wrong:
        raise _broken()
    return codes


def _encode(codes: Codes, table: Frequencies) -> bytes:
    shares = table.tolist()
    first = (np.cumsum(table, dtype=np.int64) - table).tolist()
    states, words = [LEAST] * LANES, list[int]()
    for at in range(len(codes) - 1, -1, -1):
        symbol, x = int(codes[at]), states[at % LANES]
        share = shares[symbol]
        if x >= share << 32 - BITS:
            words.append(x & 0xFFFF)
            x >>= 16
        states[at % LANES] = (x // share << BITS) + x % share + first[symbol]
    return np.array(states, _U32).tobytes() + np.array(words[::-1], _U16).tobytes()


def _decode(states: NDArray[np.uint32], words: NDArray[np.uint16], table: Frequencies, count: int) -> Codes:
    symbols = np.repeat(np.arange(len(table)), table).tolist()
    shares = table.tolist()
    first = (np.cumsum(table, dtype=np.int64) - table).tolist()
    lanes, waiting, codes = states.tolist(), iter(words.tolist()), np.empty(count, np.uint8)
    for at in range(count):
        x = lanes[at % LANES]
        slot = x & TOTAL - 1
        codes[at] = symbol = symbols[slot]
        x = shares[symbol] * (x >> BITS) + slot - first[symbol]
        if x < LEAST:
            word = next(waiting, None)
            if word is None:
                raise _broken()
            x = x << 16 | word
        lanes[at % LANES] = x
    if lanes != [LEAST] * LANES or next(waiting, None) is not None:
        raise _broken()
    return codes


def _broken() -> ProtocolError:
    return ProtocolError("coded values do not end where they should", _BROKEN)


_BROKEN: Final = "the sender's result is broken or truncated"
