"""What a decoder looks like: the numbers and flags that every back end needs. Families are made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from isthmus.protocol.errors import EngineError

SCORES = ("softmax", "sigmoid", "sparsemixer")
MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The router and experts that replace a layer's feed-forward network.

    Attributes:
        n_experts: experts per layer.
        top_k: experts that a token is sent to.
        d_expert: hidden width of an expert.
        renormalize: whether the chosen experts' weights are divided by their sum; with softmax that is softmax over
            the chosen alone.
        score: what makes weights of the router's logits: "softmax" over all experts, "sigmoid", or "sparsemixer",
            softmax over the experts whose logits are near to the chosen one's, for two experts one after the other.
        router_bias: whether the router has a bias.
        choice_bias: whether scores get a bias where experts are chosen, but not in the weights.
        n_groups, top_groups: experts are chosen in the `top_groups` best of `n_groups` equal groups of them.
        group_best: a group is as good as the sum of so many of its best experts' scores.
        scale: factor on the weights.
        jitter: how near logits are to each other in "sparsemixer": half of the relative difference that is allowed.
        d_shared: hidden width of the expert that every token goes to as well, 0 if there is none.
        shared_gate: whether the shared expert's output is multiplied by the sigmoid of a linear map of its input.
        bias: whether gate, up and down have biases.
        swiglu_limit: 0 for SiLU(gate) up; else (up + 1) gate sigmoid(swiglu_alpha gate), with gate at most
            `swiglu_limit` and up within -swiglu_limit..swiglu_limit.
        weigh: whether the chosen experts' outputs are weighted at all; if not each of them counts in full, and the
            router only selects.
        pre_gate: whether the router reads the normalized feed-forward input of the layer before, so that a layer's
            experts are known one layer ahead; that of the first layer reads its own.
        dense_layers: the layers that have no experts but a feed-forward network of `DecoderConfig.d_ff`, ascending.
    """

    n_experts: int
    top_k: int
    d_expert: int
    renormalize: bool = True
    score: str = "softmax"
    router_bias: bool = False
    choice_bias: bool = False
    n_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    scale: float = 1.0
    jitter: float = 0.0
    d_shared: int = 0
    shared_gate: bool = False
    bias: bool = False
    swiglu_alpha: float = 1.0
    swiglu_limit: float = 0.0
    dense_layers: tuple[int, ...] = ()
    weigh: bool = True
    pre_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts <= MAX_EXPERTS:
            limits = f"they must lie in 1..n_experts and 1..{MAX_EXPERTS}"
            raise EngineError(f"top_k is {self.top_k} with {self.n_experts} experts", limits)
        if not (1 <= self.d_expert < 2**31 and 0 <= self.d_shared < 2**31):
            raise EngineError(f"experts are {self.d_expert} wide and the shared one {self.d_shared}")
        if self.score not in SCORES:
            raise EngineError(f"a router's score is {self.score!r}", f"choose among {', '.join(SCORES)}")
        size, rest = divmod(self.n_experts, self.n_groups) if self.n_groups > 0 else (0, 1)
        fit = not rest and 1 <= self.top_groups <= self.n_groups and 1 <= self.group_best <= size
        if not fit or self.top_groups * size < self.top_k:
            problem = (
                f"{self.top_k} of {self.n_experts} experts in the best {self.top_groups} of {self.n_groups} groups"
            )
            raise EngineError(f"{problem} cannot be chosen by {self.group_best} of a group", "mend the configuration")
        plain = not (self.renormalize or self.choice_bias) and self.n_groups == 1
        if self.score == "sparsemixer" and not (plain and self.top_k == 2):
            raise EngineError("sparsemixer chooses two experts among all, with weights that are not changed")
        for name in ("scale", "swiglu_alpha"):
            if not 0 < getattr(self, name) < 1e6:
                raise EngineError(f"{name} of the experts is {getattr(self, name)}", "it must be positive")
        for name in ("jitter", "swiglu_limit"):
            if not 0 <= getattr(self, name) < 1e6:
                raise EngineError(f"{name} of the experts is {getattr(self, name)}", "it must not be negative")
        if self.shared_gate and not self.d_shared:
            raise EngineError("there is a gate of a shared expert, but no shared expert")
        if any(b <= a for a, b in pairwise((-1, *self.dense_layers))):
            raise EngineError(f"the dense layers are {self.dense_layers[:4]}", "they must ascend from 0")


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): one KV head, the latent and a rotated key, serves all heads.

    Attributes:
        kv_rank: width of the latent, a multiple of 16.
        d_rotated: width of the rotated part of queries and keys.
        d_plain: width of the rest of a query.
        d_value: width of a head's value, a multiple of 16.
        q_rank: width of the queries' own latent, 0 if they come straight from the hidden state.
        norm_eps: of the latents' norms.
    """

    kv_rank: int
    d_rotated: int
    d_plain: int
    d_value: int
    q_rank: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_rank", "d_value"):
            if not 16 <= getattr(self, name) < 2**16 or getattr(self, name) % 16:
                raise EngineError(f"{name} is {getattr(self, name)}", "latent attention needs a multiple of 16")
        for name, least in (("d_rotated", 2), ("d_plain", 1), ("q_rank", 0)):
            if not least <= getattr(self, name) < 2**16:
                raise EngineError(f"{name} is {getattr(self, name)}", f"it must lie in {least}..2^16-1")
        if not 0 < self.norm_eps < 1e6:
            raise EngineError(f"norm_eps is {self.norm_eps}", "it must be positive")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer with norms before its halves, rotary positions and gated feed-forward networks.

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
        qk_norm_whole: whether q and k are RMS-normalized over all their heads together (OLMoE).
        layer_norm: whether the norms before the halves and the last one subtract the mean and have biases.
        o_bias, head_bias: whether the attention's output and the output head have biases.
        sink_logits: whether each head has a logit of its own in the softmax over positions, with no value (gpt-oss).
        embedding_scale, logit_scale, residual_scale: factors on what the embedding, the head and both halves of a
            layer give.
        attention_scale: factor on the products of queries and keys, 0 for 1 / sqrt(head_dim).
        latent: latent attention, or None. With it n_kv_heads is 1, head_dim is what KV holds of a position, the
            latent and then the rotated key, and the frequencies are of the rotated part.
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
    qk_norm_whole: bool = False
    layer_norm: bool = False
    o_bias: bool = False
    head_bias: bool = False
    sink_logits: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    latent: LatentConfig | None = None

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
        for name in ("norm_eps", "rope_scale", "embedding_scale", "residual_scale", "logit_scale"):
            if not 0 < getattr(self, name) < 1e6:
                raise EngineError(f"{name} is {getattr(self, name)}", "it must be positive")
        if not 0 <= self.attention_scale < 1e6:
            raise EngineError(f"attention_scale is {self.attention_scale}", "it must not be negative")
        if not all(0 <= f <= 1e6 for f in self.rope_inv_freq):
            raise EngineError("a rotary frequency is negative or not finite", "split the model again")
        if self.n_heads % self.n_kv_heads:
            raise EngineError(f"{self.n_heads} query heads do not share {self.n_kv_heads} KV heads evenly")
        if self.rotated % 2:
            raise EngineError(f"head_dim is {self.rotated}", "rotary positions need an even one")
        if len(self.rope_inv_freq) != self.rotated // 2:
            raise EngineError(f"{len(self.rope_inv_freq)} rotary frequencies for head_dim {self.rotated}")
        if self.qk_norm_whole and (self.qk_norm or self.qkv_bias):
            raise EngineError("q and k have a norm over all heads and another one or biases as well")
        if self.experts and self.experts.dense_layers[-1:] >= (self.n_layers,):
            raise EngineError(f"layer {self.experts.dense_layers[-1]} is dense, of {self.n_layers} layers")
        if self.latent:
            self._check_latent(self.latent)
        if self.windows and len(self.windows) != self.n_layers:
            raise EngineError(f"{len(self.windows)} attention windows for {self.n_layers} layers")

    def window(self, layer: int) -> int:
        """Attention window of a layer in positions, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def _check_latent(self, latent: LatentConfig) -> None:
        held = (self.n_kv_heads, self.head_dim)
        if held != (1, latent.kv_rank + latent.d_rotated) or not self.attention_scale:
            raise EngineError(f"latent attention with {held[0]} KV heads of {held[1]}", "mend the configuration")
        if self.qkv_bias or self.qk_norm or self.qk_norm_whole or self.o_bias or self.sink_logits:
            raise EngineError("latent attention has no biases, head norms or sinks", "choose another model")

    @property
    def rotated(self) -> int:
        """How many numbers of a head are rotated, the last ones."""
        return self.latent.d_rotated if self.latent else self.head_dim

    @property
    def attention_out(self) -> int:
        """Numbers that attention gives for a position, before the output matrix."""
        return self.n_heads * (self.latent.d_value if self.latent else self.head_dim)

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The mixture of experts of a layer, None where it is dense."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @property
    def special(self) -> tuple[str, ...]:
        """The fields in use that a plain decoder does without."""
        return tuple(name for name, default in SPECIAL.items() if getattr(self, name) != default)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types. What came later than bundles is left out where it is off, so that their ids stay."""
        found = _shortened(asdict(self), SPECIAL)
        if self.experts:
            found["experts"] = _shortened(found["experts"], _SPECIAL_EXPERTS)
        return found

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DecoderConfig:
        """From what `to_dict` gave.

        Raises:
            EngineError: a field is missing, unknown or out of range.
        """
        values = dict(fields)
        try:
            if values.get("experts") is not None:
                experts = dict(values["experts"])
                experts["dense_layers"] = tuple(int(i) for i in experts.get("dense_layers", ()))
                values["experts"] = ExpertsConfig(**experts)
            if values.get("latent") is not None:
                values["latent"] = LatentConfig(**values["latent"])
            values["rope_inv_freq"] = tuple(float(f) for f in values["rope_inv_freq"])
            values["windows"] = tuple(int(w) for w in values.get("windows", ()))
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise EngineError(f"the decoder's configuration does not fit: {error}") from error


def _since(kind: type[Any], first: str) -> dict[str, Any]:
    names = [one.name for one in fields(kind)]
    return {one.name: one.default for one in fields(kind)[names.index(first) :]}


# What came after bundles, with its default: a plain decoder does without.
SPECIAL: Mapping[str, Any] = _since(DecoderConfig, "qk_norm_whole")
_SPECIAL_EXPERTS: Mapping[str, Any] = _since(ExpertsConfig, "score")


def _shortened(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in later or value != later[name]}
