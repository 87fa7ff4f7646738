"""Model families as descriptions, in tables, not classes: what their checkpoints say, and what they all share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.protocol.errors import ModelError
from isthmus.split.places import Place

MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        architectures: names in GGUF's `general.architecture`; in config.json `model_type` is the family's name.
        qkv_bias, qk_norm: see `DecoderConfig`; config.json may say another `qkv_bias`.
        window: how config.json says which layers slide: "never", "always" (if `sliding_window` is a number), "flag"
            (if `use_sliding_window`, on the layers that `layer_types` or `max_window_layers` names), or "turns" (as
            `layer_types` names them, or every second from the first on).
        flags: other flags of a `DecoderConfig`, or the settings in config.json that tell them.
        scales: config.json's names of the factors of a `DecoderConfig`; with a slash before it its reciprocal counts.
        experts: config.json's names of the numbers of an `ExpertsConfig`; a bool stands for itself.
        router: fields of an `ExpertsConfig` that are the same in all checkpoints.
        gguf_router: those that GGUF files do not tell.
        hf_experts: tensor names of an expert's gate, up and down, of the router and so on, in config.json's
            checkpoints, or their places.
        latent: whether attention is latent, in DeepSeek's names.
        short_rope: whether a "longrope" is read with its short factors, for the positions that these are made for.
        mxfp4: whether experts may be in MXFP4, and then are not transposed.
        defaults: what an absent entry of config.json means.
        settings: values of settings that this version can honour, beside or instead of those of `_OFF`.
    """

    architectures: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    window: str = "never"
    flags: Mapping[str, str | bool] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str | bool] | None = None
    router: Mapping[str, Any] = field(default_factory=dict)
    gguf_router: Mapping[str, Any] = field(default_factory=dict)
    hf_experts: Mapping[str, str | Place] = field(default_factory=dict)
    latent: bool = False
    short_rope: bool = False
    mxfp4: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SLIDING = {"sliding_window": 4096, "max_window_layers": 28}
_EXPERTS: Mapping[str, str | bool] = {
    "n_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "d_expert": "intermediate_size",
    "renormalize": True,
}
_QWEN_EXPERTS = {**_EXPERTS, "d_expert": "moe_intermediate_size", "renormalize": "norm_topk_prob"}
_MLP: Mapping[str, str] = {
    "router": "mlp.gate.weight",
    "gate": "mlp.experts.{e}.gate_proj.weight",
    "up": "mlp.experts.{e}.up_proj.weight",
    "down": "mlp.experts.{e}.down_proj.weight",
}
_BLOCK: Mapping[str, str] = {
    "router": "block_sparse_moe.gate.weight",
    "gate": "block_sparse_moe.experts.{e}.w1.weight",
    "up": "block_sparse_moe.experts.{e}.w3.weight",
    "down": "block_sparse_moe.experts.{e}.w2.weight",
}
_SHARED: Mapping[str, str] = {
    "shared.gate": "mlp.shared_expert.gate_proj.weight",
    "shared.up": "mlp.shared_expert.up_proj.weight",
    "shared.down": "mlp.shared_expert.down_proj.weight",
    "shared_gate": "mlp.shared_expert_gate.weight",
}
_GATE_UP = "mlp.experts.gate_up_proj"
_INPUT = "block_sparse_moe.input_linear.weight"
_DEEPSEEK: Mapping[str, str] = {
    **_MLP,
    "shared.gate": "mlp.shared_experts.gate_proj.weight",
    "shared.up": "mlp.shared_experts.up_proj.weight",
    "shared.down": "mlp.shared_experts.down_proj.weight",
}
_DEEPSEEK_EXPERTS: Mapping[str, str | bool] = {
    "n_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
    "n_shared": "n_shared_experts",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
_DEEPSEEK_DEFAULTS: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
}
ANY = object()  # in `Family.settings`: every value is honoured

FAMILIES: Mapping[str, Family] = {
    "llama": Family(("llama",)),
    "mistral": Family(("llama",), window="always", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "mixtral": Family(
        ("llama",),
        window="always",
        experts=_EXPERTS,
        hf_experts=_BLOCK,
        defaults={"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(("qwen2",), qkv_bias=True, window="flag", defaults=_SLIDING),
    "qwen3": Family(("qwen3",), qk_norm=True, window="flag", defaults={**_SLIDING, "head_dim": 128}),
    "qwen3_moe": Family(
        ("qwen3moe",),
        qk_norm=True,
        window="flag",
        experts=_QWEN_EXPERTS,
        hf_experts=_MLP,
        defaults={"sliding_window": 4096, "norm_topk_prob": False, "num_experts_per_tok": 8},
        settings={"mlp_only_layers": (ANY,), "decoder_sparse_step": (ANY,)},
    ),
    "qwen2_moe": Family(
        ("qwen2moe",),
        qkv_bias=True,
        window="flag",
        experts={**_QWEN_EXPERTS, "d_shared": "shared_expert_intermediate_size"},
        router={"shared_gate": True},
        gguf_router={"renormalize": False},
        hf_experts={**_MLP, **_SHARED},
        defaults={
            **_SLIDING,
            "norm_topk_prob": False,
            "num_experts_per_tok": 4,
            "num_local_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        settings={"mlp_only_layers": (ANY,), "decoder_sparse_step": (ANY,)},
    ),
    "olmoe": Family(
        ("olmoe",),
        flags={"qk_norm_whole": True},
        experts={**_EXPERTS, "renormalize": "norm_topk_prob"},
        gguf_router={"renormalize": False},
        hf_experts=_MLP,
        defaults={
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,
            "num_local_experts": 64,
            "rms_norm_eps": 1e-5,
        },
    ),
    "granitemoe": Family(
        ("granitemoe",),
        scales={
            "embedding_scale": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "/logits_scaling",
        },
        experts=_EXPERTS,
        hf_experts={
            "router": "block_sparse_moe.router.layer.weight",
            "gate": Place(_INPUT, part=0, parts=2),
            "up": Place(_INPUT, part=1, parts=2),
            "down": "block_sparse_moe.output_linear.weight",
        },
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "phimoe": Family(
        (),
        window="always",
        flags={
            "layer_norm": True,
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "head_bias": "lm_head_bias",
        },
        experts={**_EXPERTS, "renormalize": False, "jitter": "router_jitter_noise"},
        router={"score": "sparsemixer"},
        hf_experts=_BLOCK,
        short_rope=True,
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
        },
        settings={"attention_bias": (ANY,)},
    ),
    "gpt_oss": Family(
        (),
        window="turns",
        flags={"sink_logits": True, "qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        experts={**_EXPERTS, "swiglu_alpha": "swiglu_alpha", "swiglu_limit": "swiglu_limit"},
        router={"router_bias": True, "bias": True},
        hf_experts={
            "router": "mlp.router.weight",
            "router_bias": "mlp.router.bias",
            "gate": Place(_GATE_UP, part=0, parts=2, interleaved=True, transposed=True),
            "up": Place(_GATE_UP, part=1, parts=2, interleaved=True, transposed=True),
            "down": Place("mlp.experts.down_proj", transposed=True),
            "gate_bias": Place(f"{_GATE_UP}_bias", part=0, parts=2, interleaved=True),
            "up_bias": Place(f"{_GATE_UP}_bias", part=1, parts=2, interleaved=True),
            "down_bias": "mlp.experts.down_proj_bias",
        },
        defaults={
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        mxfp4=True,
        settings={"attention_bias": (ANY,)},
    ),
    "deepseek_v2": Family(
        ("deepseek2",),
        latent=True,
        experts=_DEEPSEEK_EXPERTS,
        router={"renormalize": False},
        hf_experts=_DEEPSEEK,
        defaults={**_DEEPSEEK_DEFAULTS, "n_routed_experts": 64, "n_shared_experts": 2, "topk_method": "greedy"},
        settings={
            "topk_method": (None, "greedy", "group_limited_greedy"),
            "scoring_func": (None, "softmax"),
            "norm_topk_prob": (None, False),
            "moe_layer_freq": (None, 1),
        },
    ),
    "deepseek_v3": Family(
        ("deepseek2",),
        latent=True,
        experts={**_DEEPSEEK_EXPERTS, "renormalize": "norm_topk_prob"},
        router={"score": "sigmoid", "choice_bias": True, "group_best": 2},
        hf_experts={**_DEEPSEEK, "choice_bias": "mlp.gate.e_score_correction_bias"},
        defaults={
            **_DEEPSEEK_DEFAULTS,
            "n_routed_experts": 256,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
        },
        settings={
            "topk_method": (None, "noaux_tc"),
            "scoring_func": (None, "sigmoid"),
            "rope_interleave": (None, True),
            "moe_layer_freq": (None, 1),
        },
    ),
}


def check_size(n_layers: int, head_dim: int) -> None:
    """Refuses sizes that no model has before anything is made of that size.

    Raises:
        ModelError: more layers or wider heads than MAX_LAYERS and MAX_HEAD_DIM.
    """
    if not (0 < n_layers <= MAX_LAYERS and 0 < head_dim <= MAX_HEAD_DIM):
        raise ModelError(f"{n_layers} layers with heads of {head_dim} are no model", "the checkpoint is damaged")


def check_window(window: int) -> int:
    """A layer's attention window in positions, 0 for all.

    Raises:
        ModelError: it is negative or larger than any context.
    """
    if not 0 <= window < 2**31:
        raise ModelError(f"an attention window of {window} is none", "it must lie in 0..2^31-1")
    return window


def flags(family: Family, get: Any) -> dict[str, Any]:
    """The flags of a `DecoderConfig` that a family has, or that its settings turn on."""
    return {name: flag if isinstance(flag, bool) else bool(get(flag, False)) for name, flag in family.flags.items()}


def scales(names: Mapping[str, str], get: Any) -> dict[str, Any]:
    """The factors of a `DecoderConfig` by the settings that tell them (see `Family.scales`)."""
    found = {name: float(get(key.lstrip("/"), 1.0)) for name, key in names.items()}
    return {name: 1 / value if names[name][0] == "/" else value for name, value in found.items()}
