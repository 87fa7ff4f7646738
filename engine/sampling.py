"""How a token is chosen from logits: greedy, or seeded Gumbel noise that fixes the text whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.protocol.errors import EngineError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the sampler; the defaults are greedy.

    Attributes:
        temperature: 0 for greedy (the lowest id of the largest logit), else the softmax temperature.
        top_k: keep the k largest logits, 0 for all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        seed: 64-bit seed; with the position it fixes the noise.
        stream: separates several samplers that share a seed (n choices of one prompt).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise EngineError(f"temperature is {self.temperature}", "choose one in 0..100")
        if not 0 <= self.top_k < 2**31:
            raise EngineError(f"top_k is {self.top_k}", "choose 0 (all) or more, below 2^31")
        if not 0.0 < self.top_p <= 1.0:
            raise EngineError(f"top_p is {self.top_p}", "choose one in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise EngineError(f"seed is {self.seed}", "choose one in 0..2^64-1")
        if not 0 <= self.stream < 2**32:
            raise EngineError(f"stream is {self.stream}", "choose one in 0..2^32-1")


GREEDY = Sampling()
