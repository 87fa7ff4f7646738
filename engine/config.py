"""What a decoder looks like: the numbers and flags that every back end needs. Families are made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.protocol.errors import EngineError


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The router and experts that replace a layer's feed-forward network.

    Attributes:
        n_experts: experts per layer.
        top_k: experts that a token is sent to.
        d_expert: hidden width of an expert.
        renormalize: whether the chosen experts' softmax weights are divided by their sum.
    """

    n_experts: int
    top_k: int
    d_expert: int
    renormalize: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise EngineError(f"top_k is {self.top_k} with {self.n_experts} experts", "it must lie in 1..n_experts")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norm RMSNorm, rotary positions and a gated feed-forward network.

    Attributes:
        family: name of the family's description ("llama", "qwen3", ...), for people.
        d_model: width of the hidden state.
        n_heads, n_kv_heads, head_dim: attention; `n_heads * head_dim` need not equal `d_model`.
        d_ff: width of the gated feed-forward network.
        context_length: positions that the model was trained for.
        rope_inv_freq: float32 inverse frequencies [head_dim / 2], any scaling already applied; the halves of a
            head are rotated against each other (Hugging Face order).
        rope_scale: factor on cosine and sine (YaRN's attention factor).
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether q and k heads are RMS-normalized before the rotation (Qwen3).
        windows: attention window of each layer in positions, 0 for all; empty means 0 everywhere.
        tied: whether the output head is the embedding.
        experts: the mixture of experts in every layer, or None.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    tied: bool = False
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "n_layers",
            "d_model",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "context_length",
        ):
            if not 1 <= getattr(self, name) < 2**31:
                raise EngineError(f"{name} is {getattr(self, name)}", "it must lie in 1..2^31-1")
        for name in ("norm_eps", "rope_scale"):
            if not 0 < getattr(self, name) < 1e6:
                raise EngineError(f"{name} is {getattr(self, name)}", "it must be positive")
        if not all(0 <= f <= 1e6 for f in self.rope_inv_freq):
            raise EngineError("a rotary frequency is negative or not finite", "split the model again")
        if self.n_heads % self.n_kv_heads:
            raise EngineError(f"{self.n_heads} query heads do not share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise EngineError(f"head_dim is {self.head_dim}", "rotary positions need an even one")
        if len(self.rope_inv_freq) != self.head_dim // 2:
            raise EngineError(f"{len(self.rope_inv_freq)} rotary frequencies for head_dim {self.head_dim}")
        if self.windows and len(self.windows) != self.n_layers:
            raise EngineError(f"{len(self.windows)} attention windows for {self.n_layers} layers")

    def window(self, layer: int) -> int:
        """Attention window of a layer in positions, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DecoderConfig:
        """From what `to_dict` gave.

        Raises:
            EngineError: a field is missing, unknown or out of range.
        """
        values = dict(fields)
        try:
            if values.get("experts") is not None:
                values["experts"] = ExpertsConfig(**values["experts"])
            values["rope_inv_freq"] = tuple(float(f) for f in values["rope_inv_freq"])
            values["windows"] = tuple(int(w) for w in values.get("windows", ()))
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise EngineError(f"the decoder's configuration does not fit: {error}") from error
