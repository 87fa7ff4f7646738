"""Model families as descriptions: what each config.json or GGUF header means, in tables, not classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.protocol.errors import EngineError, ModelError
from isthmus.split.rope import rope_frequencies

MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        architectures: names in GGUF's `general.architecture`; in config.json `model_type` is the family's name.
        qkv_bias, qk_norm: see `DecoderConfig`.
        window: how config.json says which layers slide: "never", "always" (if `sliding_window` is a number), or
            "flag" (if `use_sliding_window`, on the layers that `layer_types` or `max_window_layers` names).
        experts: config.json's names of the numbers of an `ExpertsConfig`; a bool stands for itself.
        hf_experts: tensor names of an expert's gate, up and down and of the router, in config.json's checkpoints.
        defaults: what an absent entry of config.json means.
    """

    architectures: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    window: str = "never"
    experts: Mapping[str, str | bool] | None = None
    hf_experts: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SLIDING = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(("llama",)),
    "mistral": Family(("llama",), window="always", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "mixtral": Family(
        ("llama",),
        window="always",
        experts={
            "n_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "d_expert": "intermediate_size",
            "renormalize": True,
        },
        hf_experts={
            "router": "block_sparse_moe.gate.weight",
            "gate": "block_sparse_moe.experts.{e}.w1.weight",
            "up": "block_sparse_moe.experts.{e}.w3.weight",
            "down": "block_sparse_moe.experts.{e}.w2.weight",
        },
        defaults={"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(("qwen2",), qkv_bias=True, window="flag", defaults=_SLIDING),
    "qwen3": Family(("qwen3",), qk_norm=True, window="flag", defaults={**_SLIDING, "head_dim": 128}),
    "qwen3_moe": Family(
        ("qwen3moe",),
        qk_norm=True,
        window="flag",
        experts={
            "n_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "d_expert": "moe_intermediate_size",
            "renormalize": "norm_topk_prob",
        },
        hf_experts={
            "router": "mlp.gate.weight",
            "gate": "mlp.experts.{e}.gate_proj.weight",
            "up": "mlp.experts.{e}.up_proj.weight",
            "down": "mlp.experts.{e}.down_proj.weight",
        },
        defaults={"sliding_window": 4096, "norm_topk_prob": False, "num_experts_per_tok": 8},
    ),
}

_ALIASES = {"num_experts": "num_local_experts"}  # both are in use for qwen3_moe

# Settings that this version cannot honour, with the values that mean "off".
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "hidden_act": (None, "swish", "silu"),
    "pretraining_tp": (None, 1),
}

# role -> tensor of a layer; the prefix of layer i is "model.layers.i." or "blk.i."
HF_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
HF_TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
GGUF_NAMES: Mapping[str, str] = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
GGUF_EXPERTS = {
    "router": "ffn_gate_inp.weight",
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
}
GGUF_TOP = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}


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
    for setting, off in _OFF.items():
        if config.get(setting) not in off:
            problem = f"{setting}={_short(config[setting])} of {name} is not supported"
            raise ModelError(problem, f"supported is {setting}={off[-1]!r}")

    def get(key: str, default: Any = None) -> Any:
        value = config.get(key)
        value = family.defaults.get(key, default) if value is None and key not in config else value
        return default if value is None else value

    try:
        n_layers, d_model, n_heads = (
            int(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        head_dim, context = int(get("head_dim", d_model // n_heads)), int(get("max_position_embeddings", 2048))
        check_size(n_layers, head_dim)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta", get("rope_theta", 10000.0)))
        if config.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        frequencies, scale = rope_frequencies(head_dim, theta, context, rope)
        return family, DecoderConfig(
            family=name,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=int(get("num_key_value_heads", n_heads)),
            head_dim=head_dim,
            d_ff=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            context_length=context,
            norm_eps=float(get("rms_norm_eps", 1e-6)),
            rope_inv_freq=tuple(float(f) for f in frequencies),
            rope_scale=scale,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=_windows(family, config, get, n_layers),
            tied=bool(get("tie_word_embeddings", False)) or not has_head,
            experts=_experts(family, get),
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
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(n_layers)]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"layer types {sorted(unknown)} are not supported", "choose another model")
    return tuple(check_window(int(window)) if kind == "sliding_attention" else 0 for kind in kinds)


def _experts(family: Family, get: Any) -> ExpertsConfig | None:
    if family.experts is None:
        return None
    values = {key: get(name) if isinstance(name, str) else name for key, name in family.experts.items()}
    return ExpertsConfig(
        int(values["n_experts"]), int(values["top_k"]), int(values["d_expert"]), bool(values["renormalize"])
    )


def config_from_gguf(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: NDArray[np.float32] | None = None,
) -> tuple[Family, DecoderConfig]:
    """The family and shapes that GGUF metadata describes.

    Args:
        fields: the metadata.
        shapes: shapes of the tensors.
        rope_factors: the tensor `rope_freqs.weight` [head_dim / 2], which divides the frequencies (Llama 3).

    Raises:
        ModelError: an unknown architecture, a setting that is not supported, or a missing number.
    """
    arch = str(fields.get("general.architecture", "?"))
    known = sorted({a for f in FAMILIES.values() for a in f.architectures})
    if arch not in known:
        raise ModelError(f"GGUF architecture {arch!r} is not supported", f"supported are {', '.join(known)}")

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise ModelError(f"the GGUF metadata have no {arch}.{key}", "fetch the model again")
        if np.ndim(value) and len(set(np.asarray(value).tolist())) == 1:
            value = np.asarray(value)[0].item()
        if np.ndim(value):
            raise ModelError(f"{arch}.{key} differs between layers, which is not supported", "choose another model")
        return value

    try:
        n_experts, window = int(get("expert_count", 0)), check_window(int(get("attention.sliding_window", 0)))
        name = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}.get(arch)
        name = name or ("mixtral" if n_experts else "mistral" if window else "llama")
        family = FAMILIES[name]
        d_model, n_heads, context = (
            int(get("embedding_length")), int(get("attention.head_count")), int(get("context_length"))
        )  # fmt: skip
        head_dim, d_ff = int(get("attention.key_length", d_model // n_heads)), int(get("feed_forward_length"))
        n_layers = int(get("block_count"))
        check_size(n_layers, head_dim)
        if int(get("attention.value_length", head_dim)) != head_dim:
            raise ModelError("keys and values of different sizes are not supported", "choose another model")
        rotated = int(get("rope.dimension_count", head_dim))
        rope: dict[str, Any] = {"partial_rotary_factor": rotated / head_dim}
        kind, factor = str(get("rope.scaling.type", "none")), float(get("rope.scaling.factor", 0.0))
        linear = float(get("rope.scale_linear", 1.0))
        if kind != "none" and factor not in (0.0, 1.0):
            rope |= {"rope_type": kind, "factor": factor}
            rope["original_max_position_embeddings"] = int(get("rope.scaling.original_context_length", context))
        elif linear != 1.0:
            rope |= {"rope_type": "linear", "factor": linear}
        frequencies, scale = rope_frequencies(head_dim, float(get("rope.freq_base", 10000.0)), context, rope)
        if rope_factors is not None:
            if rope_factors.shape != frequencies.shape:
                raise ModelError(f"rope_freqs.weight has shape {rope_factors.shape}", "fetch the model again")
            frequencies = frequencies / rope_factors
        experts = None
        if n_experts:
            d_expert = int(get("expert_feed_forward_length", d_ff))
            experts = ExpertsConfig(n_experts, int(get("expert_used_count")), d_expert)
        return family, DecoderConfig(
            family=name,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=int(get("attention.head_count_kv", n_heads)),
            head_dim=head_dim,
            d_ff=d_ff,
            vocab_size=shapes.get(GGUF_TOP["embedding"], (0,))[0],
            context_length=context,
            norm_eps=float(get("attention.layer_norm_rms_epsilon")),
            rope_inv_freq=tuple(float(f) for f in frequencies),
            rope_scale=scale,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=(window,) * n_layers if window else (),
            tied=GGUF_TOP["head"] not in shapes,
            experts=experts,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"the GGUF metadata have a value of the wrong type: {error}", "fetch it again") from error
    except EngineError as error:
        raise ModelError(f"the GGUF metadata: {error.problem}", error.remedy) from error


def half_rotated_rows(rows: int, head_dim: int) -> NDArray[np.int64]:
    """For each row of q or k in Hugging Face order its row in a GGUF of architecture `llama`, which interleaves
    the halves of a head."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)
