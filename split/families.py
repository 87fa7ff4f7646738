"""Model families as descriptions, in tables, not classes, and what a config.json makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.engine.config import DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.protocol.errors import EngineError, ModelError
from isthmus.split.places import Place
from isthmus.split.rope import rope_frequencies, short_frequencies

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
        settings={"attention_bias": (ANY,)},
    ),
    "deepseek_v2": Family(
        (),
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
        (),
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

_FRACTIONS = ("jitter", "scale", "swiglu_alpha", "swiglu_limit")
_ALIASES = {"num_experts": "num_local_experts"}  # both are in use for qwen3_moe

# Settings that this version cannot honour, with the values that mean "off".
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "clip_qkv": (None,),
    "hidden_act": (None, "swish", "silu"),
    "pretraining_tp": (None, 1),
}

_HINTS = {"quantization_config": ": dequantize the checkpoint (to bfloat16) and save it again"}

# role -> tensor of a layer; the prefix of layer i is "model.layers.i." or "blk.i."
HF_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm.weight",
    "attn_norm_bias": "input_layernorm.bias",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "sink_logits": "self_attn.sinks",
    "q_down": "self_attn.q_a_proj.weight",
    "q_down_norm": "self_attn.q_a_layernorm.weight",
    "q_up": "self_attn.q_b_proj.weight",
    "latent": "self_attn.kv_a_proj_with_mqa.weight",
    "latent_norm": "self_attn.kv_a_layernorm.weight",
    "k_up": "self_attn.kv_b_proj.weight",
    "v_up": "self_attn.kv_b_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_norm_bias": "post_attention_layernorm.bias",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
HF_TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
}


def config_from_hf(config: Mapping[str, Any], *, has_head: bool = True) -> tuple[Family, DecoderConfig]:
    """The family and shapes that a config.json describes.

    Args:
        config: the parsed file.
        has_head: whether the checkpoint holds an output head of its own.

    Raises:
        ModelError: an unknown family, a setting that is not supported, or a missing number.
    """
    config = {_ALIASES.get(key, key): value for key, value in config.items()}
    name = str(config.get("model_type", "?"))
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(f"model family {name!r} is not supported", f"supported are {', '.join(FAMILIES)}")
    for setting, off in {**_OFF, **family.settings}.items():
        if ANY not in off and config.get(setting) not in off:
            problem = f"{setting}={_short(config[setting])} of {name} is not supported"
            raise ModelError(problem, f"supported is {setting}={off[-1]!r}{_HINTS.get(setting, '')}")

    def get(key: str, default: Any = None) -> Any:
        value = config.get(key)
        value = family.defaults.get(key, default) if value is None and key not in config else value
        return default if value is None else value

    try:
        n_layers, d_model, n_heads = (
            int(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        latent, context = _latent(get) if family.latent else None, int(get("max_position_embeddings", 2048))
        head_dim = latent.kv_rank + latent.d_rotated if latent else int(get("head_dim", d_model // n_heads))
        rotated = latent.d_rotated if latent else head_dim
        check_size(n_layers, head_dim)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope = rope or dict(family.defaults.get("rope_scaling", {}))
        theta = float(rope.get("rope_theta", get("rope_theta", 10000.0)))
        if config.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        if family.short_rope and rope.get("rope_type", rope.get("type")) == "longrope":
            frequencies, scale, context = short_frequencies(rotated, theta, context, rope)
        else:
            frequencies, scale = rope_frequencies(rotated, theta, context, rope)
        return family, DecoderConfig(
            family=name,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=1 if latent else int(get("num_key_value_heads", n_heads)),
            head_dim=head_dim,
            d_ff=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            context_length=context,
            norm_eps=float(get("rms_norm_eps", 1e-6)),
            rope_inv_freq=tuple(float(f) for f in frequencies),
            rope_scale=scale,
            qk_norm=family.qk_norm,
            windows=_windows(family, config, get, n_layers),
            tied=bool(get("tie_word_embeddings", False)) or not has_head,
            experts=_experts(family, config, get, n_layers),
            **{"qkv_bias": bool(get("qkv_bias", family.qkv_bias)), **flags(family, get)},
            **scales(family.scales, get),
            **({} if latent is None else {"latent": latent, "attention_scale": _latent_scale(latent, rope)}),
        )
    except KeyError as error:
        raise ModelError(f"config.json has no {error}", "fetch the model again") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json has a value of the wrong type: {error}", "fetch the model again") from error
    except EngineError as error:
        raise ModelError(f"config.json: {error.problem}", error.remedy) from error


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _windows(family: Family, config: Mapping[str, Any], get: Any, n_layers: int) -> tuple[int, ...]:
    """The window of each layer; a position sees itself and the window - 1 before it."""
    window = get("sliding_window")
    if family.window == "never" or not window or (family.window == "flag" and not config.get("use_sliding_window")):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(get("max_window_layers", 0)) if family.window == "flag" else 0
        full = [index % 2 if family.window == "turns" else index < first for index in range(n_layers)]
        kinds = ["full_attention" if one else "sliding_attention" for one in full]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"layer types {sorted(unknown)} are not supported", "choose another model")
    return tuple(check_window(int(window)) if kind == "sliding_attention" else 0 for kind in kinds)


def flags(family: Family, get: Any) -> dict[str, Any]:
    """The flags of a `DecoderConfig` that a family has, or that its settings turn on."""
    return {name: flag if isinstance(flag, bool) else bool(get(flag, False)) for name, flag in family.flags.items()}


def scales(names: Mapping[str, str], get: Any) -> dict[str, Any]:
    """The factors of a `DecoderConfig` by the settings that tell them (see `Family.scales`)."""
    found = {name: float(get(key.lstrip("/"), 1.0)) for name, key in names.items()}
    return {name: 1 / value if names[name][0] == "/" else value for name, value in found.items()}


def _latent(get: Any) -> LatentConfig:
    heads = get("num_attention_heads")
    if get("num_key_value_heads", heads) != heads:
        problem = f"num_key_value_heads={get('num_key_value_heads')} with latent attention is not supported"
        raise ModelError(problem, f"supported is num_key_value_heads={heads}")
    return LatentConfig(
        kv_rank=int(get("kv_lora_rank")),
        d_rotated=int(get("qk_rope_head_dim")),
        d_plain=int(get("qk_nope_head_dim")),
        d_value=int(get("v_head_dim")),
        q_rank=int(get("q_lora_rank", 0)),
    )


def _latent_scale(latent: LatentConfig, rope: Mapping[str, Any]) -> Any:
    """The factor on products of queries and keys: DeepSeek takes YaRN's magnitude into it, squared."""
    scale = (latent.d_plain + latent.d_rotated) ** -0.5
    weight, kind = float(rope.get("mscale_all_dim") or 0), rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or not weight or float(rope["factor"]) <= 1:
        return scale
    return scale * (0.1 * weight * math.log(float(rope["factor"])) + 1) ** 2


def _experts(family: Family, config: Mapping[str, Any], get: Any, n_layers: int) -> ExpertsConfig | None:
    if family.experts is None:
        return None
    values = {key: get(name) if isinstance(name, str) else name for key, name in family.experts.items()}
    if get("topk_method") == "greedy":
        values |= {"n_groups": 1, "top_groups": 1}
    for key, name in family.experts.items():
        if values[key] is None:
            raise ModelError(f"config.json has no {name}", "fetch the model again")
    kinds: Mapping[str, Any] = {"renormalize": bool, **dict.fromkeys(_FRACTIONS, float)}
    numbers = {key: kinds.get(key, int)(value) for key, value in values.items()}
    if shared := numbers.pop("n_shared", 0):
        numbers["d_shared"] = shared * numbers["d_expert"]
    step, dense = int(get("decoder_sparse_step", 1)), {int(index) for index in get("mlp_only_layers", [])}
    dense |= set(range(int(get("first_k_dense_replace", 0))))
    dense = {index for index in range(n_layers) if index in dense or (step and (index + 1) % step)}
    return ExpertsConfig(**numbers, **family.router, dense_layers=tuple(sorted(dense)))
