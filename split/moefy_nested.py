"""A converted model whose experts are read in nested bits, as many as their shares of a token ask for.

For quantization-aware training gradients pass through the rounding as if it were not there (straight-through, Bengio
et al., 1308.3432), so that it finds weights that say with few bits what they say with many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.quant.groups import decode_rows, encode_rows
from isthmus.quant.nested import WIDTHS
from isthmus.quant.planes import MATRICES
from isthmus.split.moefy_decoder import Feed
from isthmus.split.moefy_mixture import Batch, Mixture, sent
from isthmus.split.tolerance_shares import shares_within


class NestedMixture(Mixture):
    """See the module. It shares its weights with the mixture it is made of.

    Args:
        format: of `quant.nested.WIDTHS`: how many planes there are.

    Attributes:
        planes: of an expert.
        shares: the least share of a token that takes each plane, f32 [layers, planes]; all planes are read at first.
    """

    def __init__(self, mixture: Mixture, format: str) -> None:
        super().__init__(mixture.decoder, mixture.feeds, mixture.routers, mixture.pre_gate)
        self.planes = WIDTHS.index(format) + 1
        self.shares = torch.zeros(len(self.feeds), self.planes)
        self._recorded: list[Tensor] | None = None
        self._residuals = [[_like(feed) for feed in self.feeds] for _ in range(self.planes)]
        self._format = format

    def round(self) -> None:
        """Rounds its weights anew, each to the nearest."""
        with torch.no_grad():
            for index, feed in enumerate(self.feeds):
                for name in MATRICES:
                    w = getattr(feed, name).detach()
                    rows = w if name != "down" else w.reshape(len(w) * self.experts, -1)  # groups end with an expert
                    arrays = encode_rows(rows.numpy(), self._format)
                    for plane in range(self.planes):
                        found = torch.from_numpy(decode_rows(WIDTHS[plane], arrays, rows.shape[1]))
                        torch.sub(found.view(w.shape), w, out=getattr(self._residuals[plane][index], name))

    def set_rounding(self, widths: list[list[Feed]]) -> None:
        """Takes what weights are read as with one, two, .. planes, of all layers, from another rounding."""
        with torch.no_grad():
            for feeds, residuals in zip(widths, self._residuals, strict=True):
                for feed, right, apart in zip(feeds, self.feeds, residuals, strict=True):
                    for name in MATRICES:
                        torch.sub(getattr(feed, name), getattr(right, name), out=getattr(apart, name))

    def errors(self) -> NDArray[np.float64]:
        """What experts are off by when some of their planes are read; see `tolerance_run.expert_errors`."""
        found = np.zeros((len(self.feeds), self.planes + 1))
        found[:, 0] = 1.0
        with torch.no_grad():
            for index, feed in enumerate(self.feeds):
                for name in MATRICES:
                    last = getattr(self._residuals[-1][index], name)
                    energy = float((getattr(feed, name) + last).square().sum()) or 1.0
                    for plane in range(self.planes - 1):
                        apart = getattr(self._residuals[plane][index], name) - last
                        found[index, plane + 1] += float(apart.square().sum()) / energy
        return np.minimum(found, 1.0)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Has the shares of the experts that tokens are sent to added to a list: f32 [tokens, layers, active], batch
        after batch."""
        self._recorded, batches = [], list[Tensor]()
        try:
            yield batches
            layers = len(self.feeds)
            each = (self._recorded[at : at + layers] for at in range(0, len(self._recorded), layers))
            batches += [torch.stack(found, dim=1) for found in each]
        finally:
            self._recorded = None

    def within(self, batch: Batch, active: int, bits: float) -> Tensor:
        """The least shares with which a batch reads about so many bits in the mean; see `shares`, which are all 0 then.

        About, as experts that are not read whole change what the layers behind them choose.
        """
        self.shares = torch.zeros_like(self.shares)
        with torch.no_grad(), self.recording() as recorded:
            self.last(batch, active)
        return torch.from_numpy(shares_within(self.errors(), torch.cat(recorded).numpy(), bits))

    def _sent(self, index: int, normed: Tensor, chosen: Tensor, logits: Tensor) -> Tensor:
        shares = logits.softmax(-1)
        if self._recorded is not None:
            self._recorded.append(shares)
        planes = (shares[..., None] >= self.shares[index]).cumprod(-1).sum(-1)
        parts = self.feeds[index].parts(self.experts)
        residuals = [feeds[index].parts(self.experts) for feeds in self._residuals]

        def network(name: int) -> Feed:
            plane, expert = divmod(name, self.experts)
            part, apart = parts[expert], residuals[plane][expert]
            return Feed(part.gate + apart.gate, part.up + apart.up, part.down + apart.down)

        return sent(normed, (planes - 1) * self.experts + chosen, network, self.decoder.dtype)


def _like(feed: Feed) -> Feed:
    return Feed(*(torch.zeros_like(getattr(feed, name), requires_grad=False) for name in MATRICES))
