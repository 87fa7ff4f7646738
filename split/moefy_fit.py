"""Experts rounded to nested codes, layer after layer, each fitted to what the rounded layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.engine.experts import Expert
from isthmus.quant.fitted import Aim, fit
from isthmus.quant.groups import decode_rows, pack, quantize
from isthmus.quant.nested import WIDTHS
from isthmus.quant.rounding import Arrays
from isthmus.split.moefy_decoder import Feed
from isthmus.split.moefy_experts import most
from isthmus.split.moefy_mixture import Batch, Mixture

_COMMON = 0.2  # of what an expert's inputs are taken for, all tokens' are: few tokens come to some experts


def rounded(feed: Feed, experts: int, format: str) -> list[Expert]:
    """A layer's experts, each weight rounded for itself.

    Args:
        feed: neurons by expert.
        format: one of `quant.groups.QUANTIZABLE`.
    """
    return [
        Expert(*(quantize(matrix.contiguous().numpy(), format) for matrix in (part.gate, part.up, part.down)))
        for part in feed.parts(experts)
    ]


def fitted(
    mixture: Mixture,
    some: Sequence[Batch],
    active: int,
    format: str,
    aim: Aim | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Expert]]:
    """The experts of all layers, fitted to the tokens that come to them; the mixture stays as it is.

    Args:
        some: samples, some ten thousand tokens.
        active: experts that a token is sent to.
        format: a nested one.
        aim: see `quant.fitted.fit`.
        progress: called with layers done and layers in all.
    """
    decoder, found, before = mixture.decoder, list[list[Expert]](), None
    with torch.no_grad():
        states = [decoder.embedded(batch.tokens) for batch in some]
        for index, layer in enumerate(decoder.layers):
            states = [layer.attended(x) for x in states]
            normed = torch.cat([layer.normed(x[batch.there]) for x, batch in zip(states, some, strict=True)])
            read = normed if before is None or not mixture.pre_gate else before
            chosen = most(read @ mixture.routers[index].T, active)
            experts, added = _layer(mixture.feeds[index], normed, chosen, format, aim)
            found.append(experts)
            for x, batch, rows in zip(states, some, torch.split(added, [batch.size for batch in some]), strict=True):
                x[batch.there] += rows
            before = normed
            if progress:
                progress(index + 1, len(decoder.layers))
    return found


def _layer(feed: Feed, normed: Tensor, chosen: Tensor, format: str, aim: Aim | None) -> tuple[list[Expert], Tensor]:
    """A layer's experts, and what they add to the states with 4 bits, or with 2 where there are no more.

    Args:
        normed: what they read [n, d_model] f32.
        chosen: 1 for each expert that a token is sent to [n, experts].
    """
    experts, d_model = chosen.shape[1], normed.shape[1]
    width = len(feed.gate) // experts
    told = WIDTHS[min(1, WIDTHS.index(format))]
    tokens = [torch.nonzero(chosen[:, e]).ravel() for e in range(experts)]
    gate_up = np.concatenate(
        [feed.gate.numpy().reshape(experts, width, d_model), feed.up.numpy().reshape(experts, width, d_model)], axis=1
    )
    moments = _moments([normed[rows] for rows in tokens], normed.T @ normed / len(normed))
    wide = fit(gate_up, moments, format, aim)
    hidden = list[Tensor]()
    for e, rows in enumerate(tokens):
        gate, up = torch.split(torch.from_numpy(_values(wide, e, told, d_model)), width)
        hidden.append(torch.nn.functional.silu(normed[rows] @ gate.T) * (normed[rows] @ up.T))
    down = feed.down.reshape(d_model, experts, width).permute(1, 0, 2).contiguous().numpy()
    narrow = fit(down, _moments(hidden, None), format, aim)
    added = torch.zeros_like(normed)
    for e, rows in enumerate(tokens):
        added[rows] += hidden[e] @ torch.from_numpy(_values(narrow, e, told, width)).T
    packed = [
        Expert(
            pack(format, width, d_model, {name: array[e, :width] for name, array in wide.items()}),
            pack(format, width, d_model, {name: array[e, width:] for name, array in wide.items()}),
            pack(format, d_model, width, {name: array[e] for name, array in narrow.items()}),
        )
        for e in range(experts)
    ]
    return packed, added


def _moments(inputs: list[Tensor], common: Tensor | None) -> NDArray[np.float32]:
    """Second moments of each expert's inputs [n, width], with a share of those of all tokens [width, width]."""
    found = []
    for x in inputs:
        own = x.T @ x
        if common is not None:
            own = (1 - _COMMON) * own + _COMMON * max(1, len(x)) * common
        found.append(own)
    return torch.stack(found).numpy()


def _values(arrays: Arrays, index: int, format: str, cols: int) -> NDArray[np.float32]:
    """The weights of one matrix, read in a narrower format."""
    return decode_rows(format, {name: array[index] for name, array in arrays.items()}, cols)
