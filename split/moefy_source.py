"""A converted model's weights as a bundle holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.engine.experts import Expert
from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import ModelError
from isthmus.quant.packed import PackedMatrix
from isthmus.quant.planes import MATRICES
from isthmus.split.roles import Weights


@dataclass(frozen=True, slots=True)
class Shape:
    """The experts that a dense network is made into.

    Attributes:
        experts: of each layer, of one size.
        active: that a token is sent to.
        pre_gate: whether they are chosen one layer ahead.
    """

    experts: int
    active: int
    pre_gate: bool = False

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ModelError(f"{self.experts} experts are no mixture", "choose at least 2")
        if not 1 <= self.active <= self.experts:
            raise ModelError(
                f"{self.active} of {self.experts} experts cannot be active", f"choose 1..{self.experts} (--active)"
            )

    def of(self, config: DecoderConfig) -> DecoderConfig:
        """What a dense model's configuration becomes.

        Raises:
            ModelError: it has experts already, or its width is no multiple of theirs.
        """
        if config.experts is not None:
            problem = f"the model has {config.experts.n_experts} experts a layer already"
            raise ModelError(problem, "give a dense one; isthmus split takes this one as it is")
        if config.d_ff % self.experts:
            near = [n for n in range(2, config.d_ff + 1) if config.d_ff % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - self.experts))[:3])
            raise ModelError(
                f"{config.d_ff} neurons a layer do not make {self.experts} experts of one size",
                f"choose another number, such as {', '.join(map(str, near))}",
            )
        width = config.d_ff // self.experts
        return replace(
            config, experts=ExpertsConfig(self.experts, self.active, width, weigh=False, pre_gate=self.pre_gate)
        )


class ConvertedSource:
    """A `WeightSource`: the dense model's weights with experts in place of its feed-forward networks.

    Args:
        source: the dense model.
        experts: of each layer.
        routers: of each layer [experts, d_model] f32.

    Raises:
        ModelError: a model that cannot be of that shape.
    """

    def __init__(
        self, source: WeightSource, shape: Shape, experts: Sequence[Sequence[Expert]], routers: Sequence[Tensor]
    ) -> None:
        self._source, self._experts, self._routers = source, experts, routers
        self._config = shape.of(source.config)

    @property
    def config(self) -> DecoderConfig:
        """Shapes and flags of the converted model."""
        return self._config

    def embedding(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._source.embedding()

    def layer(self, index: int) -> Weights:
        """See `WeightSource`."""
        found = {
            name: weight for name, weight in self._source.layer(index).items() if name not in ("gate", "up", "down")
        }
        found["router"] = self._routers[index].numpy()
        for e, expert in enumerate(self._experts[index]):
            found |= {f"experts.{e}.{name}": getattr(expert, name) for name in MATRICES}
        return found

    def final_norm(self) -> NDArray[np.float32]:
        """See `WeightSource`."""
        return self._source.final_norm()

    def head(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._source.head()
