"""The seeded sampler in numpy: the same token, bit for bit, as the native one.

Inputs: logits f32 [vocab_size], a `Sampling`, the position (u32) of the row that gave the logits. A NaN among the
logits is an error; minus infinity is a token that cannot be chosen.

1. Greedy: at temperature 0 the lowest id of the largest logit. With T > 0: inv = f32(1) / f32(T), z[i] = logit[i] *
   inv, each one float32 operation; zmax = z of the largest logit. If inv or zmax is not finite: greedy as well.
2. Canonical order is logit descending, id ascending (0.0 equals -0.0). top_k > 0 keeps the first k in it.
3. top_p < 1: w[i] = exp64(f64(z[i]) - f64(zmax)) over the kept. total: 16 float64 lanes, lane l adds in ascending
   order the kept ids with id % 16 == l, then the tree l + (l + 8), l + (l + 4), l + (l + 2), l + (l + 1). Kept is the
   shortest canonical prefix (at least one) whose running sum, added one by one, is >= top_p * total, everything if
   rounding never reaches it.
4. Noise: g = -log64(-log64(u)), u = (w24 + 0.5) * 2^-24, w24 = word >> 8, word = word number (id & 3) of
   Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011) with counter
   (id >> 2, position, stream, 0) and key (seed & 0xffffffff, seed >> 32).
5. score[i] = f64(z[i]) + g. The largest score wins, ties go to the lowest id. g spans less than 20.2 (-2.86 to
   17.33), so an id with z more than 20.2 below zmax cannot win and is skipped.

exp64 and log64 are plain IEEE double operations in the order written, never fused:

log64(x), x > 0 and normal: x = m 2^e with m in [0.5, 1); if m < 0.70710678118654752440: m = 2 m, e = e - 1.
   s = (m - 1) / (m + 1), t = s s, p = Horner in t from c10 down to c0 with c_j = 1.0 / (2 j + 1);
   (2.0 s) p + f64(e) * 0.693147180559945309417232121458.
exp64(x), x <= 0: x < -700 gives 0. n = rint(x * 1.4426950408889634074); r = (x - n * 0.693147180369123816490) -
   n * 1.90821492927058770002e-10; p = Horner in r from c13 down to c0 with c_k = 1.0 / k!; ldexp(p, n).
"""

from __future__ import annotations

from math import factorial

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError

GUMBEL_SPAN = 20.2  # no token this far below the largest can win

_MASK = np.uint64(0xFFFFFFFF)
_LOG_C = [1.0 / float(2 * j + 1) for j in range(11)]
_EXP_C = [1.0 / float(factorial(k)) for k in range(14)]


def log64(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive normal doubles (any shape), the same bits on every machine."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.70710678118654752440
    m = np.where(low, 2.0 * mantissa, mantissa)
    e = (exponent - low).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    p = np.full_like(t, _LOG_C[10])
    for c in _LOG_C[9::-1]:
        p = p * t + c
    result: NDArray[np.float64] = (2.0 * s) * p + e * 0.693147180559945309417232121458
    return result


def exp64(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential of doubles <= 0 (any shape), 0 below -700; the same bits on every machine."""
    clipped = np.where(x < -700.0, 0.0, x)
    n = np.rint(clipped * 1.4426950408889634074)
    r = (clipped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = np.full_like(r, _EXP_C[13])
    for c in _EXP_C[12::-1]:
        p = p * r + c
    result: NDArray[np.float64] = np.where(x < -700.0, 0.0, np.ldexp(p, n.astype(np.int32)))
    return result


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of counters [n, 4] u32 under a key of two 32-bit words: [n, 4] u32."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(ids: NDArray[np.int64], sampling: Sampling, position: int) -> NDArray[np.float64]:
    """The noise of token ids [n] at a position: [n] f64."""
    four, place = np.unique(ids >> 2, return_inverse=True)  # four neighbouring ids share a counter
    counter = np.zeros((len(four), 4), np.uint32)
    counter[:, 0] = four
    counter[:, 1] = position
    counter[:, 2] = sampling.stream
    words = philox4x32(counter, (sampling.seed & 0xFFFFFFFF, sampling.seed >> 32))
    word = words[place, ids & 3]
    u = ((word >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
    return -log64(-log64(u))


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """Chooses a token.

    Args:
        logits: [vocab_size] f32.
        position: position of the row that gave the logits, 0 <= position < 2^32.

    Raises:
        EngineError: no logits, not float32, a NaN among them, or a position out of range.
    """
    if logits.ndim != 1 or not logits.size or logits.dtype != np.float32:
        raise EngineError(f"the sampler got logits {logits.dtype}{list(logits.shape)}", "it needs float32 [vocab_size]")
    if not 0 <= position < 2**32:
        raise EngineError(f"the sampler got position {position}", "it must lie in 0..2^32-1")
    best = int(np.argmax(logits))  # the first NaN, if there is one
    if np.isnan(logits[best]):
        raise EngineError(f"the logit of token {best} is not a number", "the weights or the hidden state are broken")
    if sampling.temperature == 0.0:
        return best
    with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
        inv = np.float32(1) / np.float32(sampling.temperature)
        z = logits * inv
    if not (np.isfinite(inv) and np.isfinite(z[best])):
        return best
    ids = kept(logits, z, sampling)
    ids = ids[z[ids].astype(np.float64) >= float(z[best]) - GUMBEL_SPAN]
    score = z[ids].astype(np.float64) + gumbel(ids, sampling, position)
    return int(ids[np.argmax(score)])  # ids ascend, so the first of equals is the lowest


def kept(logits: NDArray[np.float32], z: NDArray[np.float32], sampling: Sampling) -> NDArray[np.int64]:
    """The ids that top_k and top_p leave, ascending. `z` [vocab_size] f32 are the logits over the temperature."""
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(ids):
        ids = _first(logits, ids, sampling.top_k)
    if sampling.top_p == 1.0:
        return ids
    weight = np.zeros(-(-len(logits) // 16) * 16)
    weight[ids] = exp64(z[ids].astype(np.float64) - float(np.max(z)))
    lanes = np.add.accumulate(weight.reshape(-1, 16), axis=0)[-1]  # accumulate adds in order, sum need not
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half:]
    target = sampling.top_p * float(lanes[0])
    count = 256  # sorting the likely few is enough; more only if they do not reach the target
    while True:
        front = _first(logits, ids, count) if count < len(ids) else ids
        front = front[np.argsort(-logits[front], kind="stable")]
        reached = np.add.accumulate(weight[front]) >= target
        if reached.any():
            return np.sort(front[: int(np.argmax(reached)) + 1])
        if count >= len(ids):
            return ids
        count *= 8


def _first(logits: NDArray[np.float32], ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The first `count` of `ids` (ascending) in canonical order, given back ascending."""
    values = logits[ids]
    edge = np.partition(values, len(ids) - count)[len(ids) - count]
    keep = values > edge
    ties = np.flatnonzero(values == edge)
    keep[ties[: count - int(keep.sum())]] = True
    first: NDArray[np.int64] = ids[keep]
    return first
