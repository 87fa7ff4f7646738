"""What a session's rows must fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud.admission import SHORTEN
from isthmus.cloud.work import Refusal
from isthmus.protocol import tensors
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.messages import Code, Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What a session's rows must fit.

    Attributes:
        vocab_size: token ids lie below it.
        d_model: width of hidden states.
        context_length: positions that the model was trained for; sessions without a window end there.
        max_waiting: requests that may wait.
        channels: what is known of the channels before the layer at which rows enter.
        busy_retry_ms: told when more come.
    """

    vocab_size: int
    d_model: int
    context_length: int
    max_waiting: int = 64
    busy_retry_ms: int = 250
    channels: ChannelStats | None = None

    def check(self, tokens: list[int], end: int, window: int) -> None:
        """Refuses tokens that are none, and positions up to `end` that are too many.

        Args:
            window: the session's attention window, 0 for none.

        Raises:
            Refusal: they do not fit.
        """
        if tokens and max(tokens) >= self.vocab_size:
            raise Refusal(Code.BAD_MESSAGE, f"token {max(tokens)} of a vocabulary of {self.vocab_size}")
        if not window and end > self.context_length:
            problem = f"{end} positions exceed the model's context of {self.context_length}"
            raise Refusal(Code.KV_FULL, problem, SHORTEN)

    def check_states(self, tokens: list[int], hidden: Tensor | None, enter: int) -> None:
        """Refuses tokens without the hidden states that a session's rows need, or with those that they do not.

        Args:
            enter: layer before which they enter.

        Raises:
            Refusal: so it is.
        """
        if (hidden is not None) != (enter > 0) or (hidden is not None and hidden.shape[0] != len(tokens)):
            raise Refusal(
                Code.BAD_MESSAGE,
                f"{len(tokens)} tokens {'without' if hidden is None else 'with'} hidden states for rows that enter at "
                f"layer {enter}",
                "send a hidden state for each token, or tokens alone where enter is 0",
            )

    def states(self, hidden: Tensor) -> NDArray[np.float32]:
        """Hidden states that came, [n, d_model] f32.

        Raises:
            ProtocolError: they are coded otherwise, or not finite.
        """
        return tensors.decode(hidden, self.d_model, stats=self.channels)
