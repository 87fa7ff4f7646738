"""What a GGUF header means: family, shapes and flags, and how its tensors are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.protocol.errors import EngineError, ModelError
from isthmus.split.families import FAMILIES, Family, check_size, check_window, flags, scales
from isthmus.split.rope import rope_frequencies

# role -> tensor of a layer; the prefix of layer i is "blk.i."
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
    "q_down": "attn_q_a.weight",
    "q_down_norm": "attn_q_a_norm.weight",
    "q_up": "attn_q_b.weight",
    "latent": "attn_kv_a_mqa.weight",
    "latent_norm": "attn_kv_a_norm.weight",
    "k_up": "attn_k_b.weight",
    "v_up": "attn_v_b.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_SIGMOID = 2  # of `expert_gating_func`
FOLDERS = ("gpt-oss", "phimoe")  # known from Hugging Face folders only
# a decoder's factors; what stands after a slash divides
GGUF_SCALES = {
    "embedding_scale": "embedding_scale",
    "attention_scale": "attention.scale",
    "residual_scale": "residual_scale",
    "logit_scale": "/logit_scale",
}
PERMUTED = ("llama", "granitemoe")  # architectures whose q and k interleave the halves of a head
GGUF_OLD_LATENT = "attn_kv_b.weight"  # where older files keep both k_up and v_up
GGUF_EXPERTS = {
    "choice_bias": "exp_probs_b.bias",
    "shared.gate": "ffn_gate_shexp.weight",
    "shared.up": "ffn_up_shexp.weight",
    "shared.down": "ffn_down_shexp.weight",
    "shared_gate": "ffn_gate_inp_shexp.weight",
    "router": "ffn_gate_inp.weight",
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
}
GGUF_TOP = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}


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
        remedy = f"supported are {', '.join(known)}"
        folder = f"give its Hugging Face folder; GGUF files that are {remedy}"
        raise ModelError(f"GGUF architecture {arch!r} is not supported", folder if arch in FOLDERS else remedy)

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
        name = next((name for name, family in FAMILIES.items() if arch != "llama" and arch in family.architectures), "")
        if arch == "deepseek2" and int(get("expert_gating_func", 1)) == _SIGMOID:
            name = "deepseek_v3"
        name = name or ("mixtral" if n_experts else "mistral" if window else "llama")
        family = FAMILIES[name]
        d_model, n_heads, context = (
            int(get("embedding_length")), int(get("attention.head_count")), int(get("context_length"))
        )  # fmt: skip
        head_dim, d_ff = int(get("attention.key_length", d_model // n_heads)), int(get("feed_forward_length"))
        n_layers = int(get("block_count"))
        check_size(n_layers, head_dim)
        latent = _latent(get) if family.latent else None
        if latent:
            head_dim = latent.kv_rank + latent.d_rotated
        elif int(get("attention.value_length", head_dim)) != head_dim:
            raise ModelError("keys and values of different sizes are not supported", "choose another model")
        rotated = int(get("rope.dimension_count", head_dim))
        rope: dict[str, Any] = {} if latent else {"partial_rotary_factor": rotated / head_dim}
        kind, factor = str(get("rope.scaling.type", "none")), float(get("rope.scaling.factor", 0.0))
        linear = float(get("rope.scale_linear", 1.0))
        if kind != "none" and factor not in (0.0, 1.0):
            rope |= {"rope_type": kind, "factor": factor}
            rope["original_max_position_embeddings"] = int(get("rope.scaling.original_context_length", context))
        elif linear != 1.0:
            rope |= {"rope_type": "linear", "factor": linear}
        if latent and "factor" in rope:
            rope["attention_factor"] = 1.0  # all of YaRN's magnitude is in the scale of attention
        width = latent.d_rotated if latent else head_dim
        frequencies, scale = rope_frequencies(width, float(get("rope.freq_base", 10000.0)), context, rope)
        if rope_factors is not None:
            if rope_factors.shape != frequencies.shape:
                raise ModelError(f"rope_freqs.weight has shape {rope_factors.shape}", "fetch the model again")
            frequencies = frequencies / rope_factors
        experts = None
        if n_experts:
            d_expert = int(get("expert_feed_forward_length", d_ff))
            shared = (
                {"d_shared": int(get("expert_shared_feed_forward_length"))} if "shared_gate" in family.router else {}
            )
            if latent:
                shared = _deepseek_experts(get, d_expert, name)
            fixed = {**family.router, **family.gguf_router, **shared}
            experts = ExpertsConfig(n_experts, int(get("expert_used_count")), d_expert, **fixed)
        return family, DecoderConfig(
            family=name,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=1 if latent else int(get("attention.head_count_kv", n_heads)),
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
            **flags(family, lambda name, default: default),
            **scales(GGUF_SCALES if family.scales else {}, get),
            **({} if latent is None else {"latent": latent, "attention_scale": _latent_scale(latent, get)}),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"the GGUF metadata have a value of the wrong type: {error}", "fetch it again") from error
    except EngineError as error:
        raise ModelError(f"the GGUF metadata: {error.problem}", error.remedy) from error


def _latent(get: Any) -> LatentConfig:
    rotated, eps = int(get("rope.dimension_count")), float(get("attention.layer_norm_rms_epsilon"))
    key, value = (int(get(f"attention.{x}_length_mla", get(f"attention.{x}_length"))) for x in ("key", "value"))
    rank, q_rank = int(get("attention.kv_lora_rank")), int(get("attention.q_lora_rank", 0))
    return LatentConfig(rank, rotated, key - rotated, value, q_rank, eps)


def _latent_scale(latent: LatentConfig, get: Any) -> Any:
    """As `hf_config` has it; the header's multiplier is YaRN's weight for all dimensions, times 0.1."""
    factor, weight = float(get("rope.scaling.factor", 1.0)), float(get("rope.scaling.yarn_log_multiplier", 0.0))
    magnitude = weight * math.log(factor) + 1 if factor > 1 else 1.0
    return (latent.d_plain + latent.d_rotated) ** -0.5 * magnitude**2


def _deepseek_experts(get: Any, d_expert: int, name: str) -> dict[str, Any]:
    groups = int(get("expert_group_count", 0))
    if name == "deepseek_v3" and not groups:
        raise ModelError("the GGUF metadata have no deepseek2.expert_group_count", "convert the model again")
    return {
        "renormalize": bool(get("expert_weights_norm", False)),
        "scale": float(get("expert_weights_scale", 1.0)),
        "d_shared": d_expert * int(get("expert_shared_count", 0)),
        "n_groups": max(groups, 1),
        "top_groups": max(int(get("expert_group_used_count", 1)), 1),
        "dense_layers": tuple(range(int(get("leading_dense_block_count", 0)))),
    }
