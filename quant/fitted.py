"""Nested weights fitted to what they multiply: the error of a column is made good by the columns behind it.

As GPTQ does (Frantar et al., 2210.17323), but for three widths at once. Each width has its own copy of the weights,
into which its own errors are carried; one code of 8 bits serves all three, and is the one whose errors, squared,
weighted by width and added, are least. What the inputs are enters through their second moments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import QuantError
from isthmus.quant.nested import WIDTHS, ZERO2, ZERO4, ZERO8
from isthmus.quant.packed import GROUP
from isthmus.quant.rounding import Arrays, to_f16

_DAMP = 0.02  # of the mean second moment, added to all: few inputs do not say everything
_SCALES = np.linspace(0.94, 1.06, 7, dtype=np.float32)  # of Q4_0's; smaller ones clip, which 8 bits pay for
_NEAR = np.arange(-2, 3, dtype=np.float32)  # 4-bit codes that are tried around the nearest
_TINY = np.float32(1e-12)

F32 = NDArray[np.float32]


class Aim(NamedTuple):
    """What an error with 2, 4 and 8 bits weighs."""

    two: float = 0.05
    four: float = 1.0
    eight: float = 4.0


def fit(w: F32, moments: F32 | None, format: str, aim: Aim | None = None) -> Arrays:
    """Row-major arrays of nested matrices, each shape behind the first axis as `groups.write_rows` takes it.

    Args:
        w: weights of several matrices of one shape [n, rows, cols].
        moments: of the inputs of each: sums of x x^T, symmetric [n, cols, cols]; None where nothing is known of them.
        format: "n2", "n4" or "n8".
        aim: by default 4 and 8 bits give up a little for each other, and 2 bits more for both.

    Raises:
        QuantError: another format, shapes that do not go together, numbers that are not finite, or scales beyond f16.
    """
    if format not in WIDTHS:
        raise QuantError(f"cannot fit {format!r}", f"choose one of {', '.join(WIDTHS)}")
    n, rows, cols = w.shape
    if moments is not None and moments.shape != (n, cols, cols):
        raise QuantError(f"the inputs' moments are {moments.shape}", f"they must be {(n, cols, cols)}")
    if not np.isfinite(w).all() or not (moments is None or np.isfinite(moments).all()):
        raise QuantError("weights or inputs are not finite", "the checkpoint is damaged, or what it was run on")
    planes = WIDTHS.index(format) + 1
    weights = np.array(aim or Aim(), np.float32) * (np.arange(3) < planes)
    spread, carried = _spread(moments, n, cols)
    aims = np.repeat(np.ascontiguousarray(w)[None], 3, axis=0)  # what each width is to say: [3, n, rows, cols]
    codes = np.empty((n, rows, cols), np.uint8)
    n_groups = -(-cols // GROUP)
    s2, s4 = (np.empty((n, rows, n_groups), np.float16) for _ in range(2))
    for group in range(n_groups):
        a, b = group * GROUP, min(cols, (group + 1) * GROUP)
        block = aims[..., a:b]
        s4[..., group] = _four(block[1], spread[:, None, a:b])
        s2[..., group] = _two(block[0], block[1], s4[..., group], spread[:, None, a:b])
        errors = _codes(block, s2[..., group], s4[..., group], carried[:, a:b, a:b], weights, codes[..., a:b])
        if b < cols:
            aims[..., b:] -= errors @ carried[:, a:b, b:]
    arrays = {"p0": codes >> 6, "s2": s2, "p1": (codes >> 4) & 3, "s4": s4, "p2": codes & 15}
    return {name: arrays[name] for name in (("p0", "s2"), ("p0", "s2", "p1", "s4"), tuple(arrays))[planes - 1]}


def _spread(moments: F32 | None, n: int, cols: int) -> tuple[F32, F32]:
    """How much each column is used [n, cols], and how its error is made good [n, cols, cols], upper triangular with
    ones on the diagonal."""
    if moments is None:
        return np.ones((n, cols), np.float32), np.broadcast_to(np.eye(cols, dtype=np.float32), (n, cols, cols))
    eye = np.eye(cols)
    wide = moments.astype(np.float64)
    used = np.einsum("nii->ni", wide)
    wide = wide + np.maximum(_DAMP * used.mean(axis=1), 1e-12)[:, None, None] * eye
    # The Cholesky factor of the inverse, upper: that of the reversed matrix, inverted and reversed again.
    lower = np.linalg.cholesky(wide[:, ::-1, ::-1])
    upper = np.linalg.inv(lower)[:, ::-1, ::-1]
    carried = upper / np.einsum("nii->ni", upper)[:, :, None]
    return np.einsum("nii->ni", wide).astype(np.float32), np.ascontiguousarray(carried, np.float32)


def _four(w: F32, used: F32) -> NDArray[np.float16]:
    """The scale of 4 bits for each row of a group [n, rows, width], by least squares among a few: [n, rows]."""
    high, low = w.max(axis=2), w.min(axis=2)
    full = np.where(high > -low, high, low) / np.float32(-8)
    best, least = to_f16(full), np.full(full.shape, np.inf, np.float32)
    for factor in _SCALES:
        scale = to_f16(full * factor)
        apart = (_nearest(w, scale) - np.float32(ZERO4)) * scale[..., None].astype(np.float32) - w
        error = (used * apart * apart).sum(axis=2)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _two(w2: F32, w4: F32, s4: NDArray[np.float16], used: F32) -> NDArray[np.float16]:
    """The scale of 2 bits that suits what the 4-bit codes begin with: [n, rows]."""
    basis = np.floor(_nearest(w4, s4) / 4) - np.float32(ZERO2)
    return to_f16((used * w2 * basis).sum(axis=2) / np.maximum((used * basis * basis).sum(axis=2), _TINY))


def _nearest(w: F32, s4: NDArray[np.float16]) -> F32:
    """4-bit codes, as floats."""
    wide = s4[..., None].astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    found: F32 = np.floor(np.clip(w * inverse + np.float32(8.5), 0, 15))
    return found


def _codes(
    aims: F32, s2: NDArray[np.float16], s4: NDArray[np.float16], carried: F32, weights: F32, codes: NDArray[np.uint8]
) -> F32:
    """Fills the codes of a group, column by column; gives each width's errors [3, n, rows, width].

    Args:
        aims: [3, n, rows, width]; changed.
        carried: [n, width, width].
        codes: [n, rows, width].
    """
    two, four = s2.astype(np.float32), s4.astype(np.float32)
    inverse = np.divide(np.float32(1), four, out=np.zeros_like(four), where=four != 0)
    errors = np.empty(aims.shape, np.float32)
    for j in range(aims.shape[3]):
        _, a4, a8 = aims[..., j]
        q4 = np.clip(np.floor(a4 * inverse + np.float32(8.5)) + _NEAR[:, None, None], 0, 15)
        low = np.clip(np.floor((a8 * inverse + np.float32(8.5) - q4) * 16), 0, 15)
        said = np.stack(
            [
                (np.floor(q4 / 4) - np.float32(ZERO2)) * two,
                (q4 - np.float32(ZERO4)) * four,
                (q4 * 16 + low - np.float32(ZERO8)) * (four / 16),
            ]
        )  # [3, near, n, rows]
        apart = aims[:, None, ..., j] - said
        best = np.einsum("wknr,w->knr", apart * apart, weights).argmin(axis=0)[None]
        codes[..., j] = np.take_along_axis(q4 * 16 + low, best, axis=0)[0]
        errors[..., j] = np.take_along_axis(apart, best[None], axis=1)[:, 0]
        aims[..., j + 1 :] -= errors[..., j, None] * carried[:, j, None, j + 1 :]
    return errors
