"""What a config.json means: family, shapes and flags, and how its checkpoint's tensors are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isthmus.engine.config import DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.protocol.errors import EngineError, ModelError
from isthmus.split.families import ANY, FAMILIES, Family, check_size, check_window, flags, scales
from isthmus.split.rope import rope_frequencies, short_frequencies

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
        quantized = config.get(setting) if setting == "quantization_config" and family.mxfp4 else None
        if isinstance(quantized, dict) and quantized.get("quant_method") == "mxfp4":
            continue
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
