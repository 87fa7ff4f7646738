"""Tolerances: how many planes of an expert its share of a token asks for, and what is promised of the perplexity.

A bundle of nested experts may say, for each layer, from which share on an expert is read with 2, 4 and 8 bits; below
the first it is left out. A certificate says by how much the perplexity rises at most.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import BundleError
from isthmus.quant.planes import MAX_PLANES

NEVER = 2.0  # a share that no expert has
_HEX = frozenset("0123456789abcdef")
_AGAIN = "calibrate it again: isthmus experts calibrate"


class Tolerance(msgspec.Struct, frozen=True):
    """What a bundle says of reading experts with fewer bits.

    Attributes:
        shares: of each layer, the least share of a token's weights that takes each plane, ascending; one share a plane.
        model_id: of the model that it was calibrated on.
        data: sha256 of the documents' tokens.
        documents, tokens: how many there were.
        within: by how much the perplexity may rise, as a share: 0.01 is one per cent.
        confidence: with which it rises no more, over draws of documents like these.
        exact, bounded: perplexities of the documents with all planes, and with these.
        bound: by how much it rises at most, with that confidence.
        bits: of an expert that a token is sent to, in the mean.
    """

    shares: tuple[tuple[float, ...], ...]
    model_id: str
    data: str
    documents: int
    tokens: int
    within: float
    confidence: float
    exact: float
    bounded: float
    bound: float
    bits: float

    def array(self, planes: int) -> NDArray[np.float32]:
        """float32 [layers, planes], as `Layers.tolerate` takes it, for experts of so many planes."""
        return np.array(self.shares, np.float32).reshape(len(self.shares), -1)[:, :planes]

    def check(self, config: DecoderConfig, model_id: str) -> None:
        """Compares with the bundle.

        Raises:
            BundleError: another model's, or values that cannot be.
        """
        if self.model_id != model_id:
            raise BundleError("bundle.json has a tolerance that was calibrated on another model", _AGAIN)
        planes = {len(row) for row in self.shares}
        right = (
            config.experts is not None
            and len(self.shares) == config.n_layers
            and len(planes) == 1
            and planes <= set(range(1, MAX_PLANES + 1))
            and all(0 <= share <= NEVER for row in self.shares for share in row)
            and all(list(row) == sorted(row) for row in self.shares)
            and len(self.data) == 64
            and _HEX.issuperset(self.data)
            and 0 < self.documents <= self.tokens
            and 0 < self.within <= 1
            and 0 < self.confidence < 1
            and all(math.isfinite(value) and value > 0 for value in (self.exact, self.bounded))
            and math.isfinite(self.bound)
            and 0 <= self.bits <= 8
        )
        if not right:
            raise BundleError("bundle.json has a tolerance whose values cannot be", _AGAIN)
        if self.bound > self.within:
            raise BundleError(
                f"bundle.json has a tolerance of {self.within:.2%} and bounds the rise by {self.bound:.2%}", _AGAIN
            )
