"""Families of mixtures of experts, from config.json and from GGUF: what is read, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from isthmus.engine.config import DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.engine.shapes import array_shapes, matrix_shapes
from isthmus.protocol.errors import ModelError
from isthmus.split.gguf_config import config_from_gguf
from isthmus.split.hf_config import config_from_hf

BASE = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128,
    "max_position_embeddings": 512, "num_experts_per_tok": 2, "num_local_experts": 8, "moe_intermediate_size": 24,
}  # fmt: skip
SHAPES = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def hf(family: str, **changes: Any) -> DecoderConfig:
    return config_from_hf({**BASE, "model_type": family, **changes})[1]


def gguf(arch: str, **changes: Any) -> DecoderConfig:
    fields: dict[str, Any] = {
        "block_count": 2, "embedding_length": 64, "attention.head_count": 4, "context_length": 512,
        "feed_forward_length": 128, "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 8,
        "expert_used_count": 2, "expert_feed_forward_length": 24,
    }  # fmt: skip
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    return config_from_gguf(
        {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in fields.items()}}, SHAPES
    )[1]


def test_layers_without_experts() -> None:
    for family in ("qwen2_moe", "qwen3_moe"):
        found = [
            hf(family, **changes).experts
            for changes in ({}, {"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": None})
        ]
        assert [experts and experts.dense_layers for experts in found] == [(), (0, 2), (0, 2), ()]


def test_qwen2_moe_has_a_gated_shared_expert() -> None:
    config = hf("qwen2_moe", shared_expert_intermediate_size=80)
    assert config.experts == ExpertsConfig(8, 2, 24, False, d_shared=80, shared_gate=True)
    assert config.qkv_bias and not hf("qwen2_moe", qkv_bias=False).qkv_bias
    config = gguf("qwen2moe", expert_shared_feed_forward_length=80)
    assert config.experts == ExpertsConfig(8, 2, 24, False, d_shared=80, shared_gate=True) and config.qkv_bias


def test_olmoe_has_one_norm_for_all_heads() -> None:
    config = hf("olmoe")
    assert config.experts == ExpertsConfig(8, 2, 128, False) and config.qk_norm_whole and not config.qk_norm
    assert config.norm_eps == 1e-5
    config = gguf("olmoe")
    assert config.experts == ExpertsConfig(8, 2, 24, False) and config.qk_norm_whole


def test_granite_has_factors() -> None:
    scales = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22}
    config = hf("granitemoe", logits_scaling=6.0, **scales)
    assert (config.embedding_scale, config.attention_scale, config.residual_scale) == (12.0, 0.0078125, 0.22)
    assert config.logit_scale == pytest.approx(1 / 6) and config.experts == ExpertsConfig(8, 2, 128)
    factors = {"embedding_scale": 12.0, "attention__scale": 0.0078125, "residual_scale": 0.22, "logit_scale": 6.0}
    found = gguf("granitemoe", **factors)
    assert [getattr(found, name) for name in found.special] == [getattr(config, name) for name in config.special]
    assert hf("granitemoe").special == ("attention_scale",)  # whose default is 1, not 1 / sqrt(head_dim)


def test_phimoe_has_layer_norms_and_mixes_sparsely() -> None:
    config = hf("phimoe", num_key_value_heads=2, attention_bias=True)
    assert config.experts == ExpertsConfig(8, 2, 128, False, "sparsemixer", jitter=0.01)
    assert config.special == ("layer_norm", "o_bias") and config.qkv_bias
    assert hf("phimoe", num_key_value_heads=2, lm_head_bias=True).special == ("layer_norm", "head_bias")


def test_a_longrope_is_short() -> None:
    """Within the positions that its short factors are for; the long ones would change all keys."""
    rope = {"type": "longrope", "short_factor": [1.0, 2.0] * 4, "short_mscale": 1.2, "long_factor": [9.0] * 8}
    config = hf("phimoe", num_key_value_heads=2, rope_scaling=rope, original_max_position_embeddings=64)
    assert (config.context_length, config.rope_scale) == (64, 1.2)
    assert config.rope_inv_freq[1] == pytest.approx(1e6 ** (-2 / 16) / 2)
    for wrong in ({"short_factor": [1.0]}, {"short_mscale": None}, {"short_factor": [0.0] * 8}):
        with pytest.raises(ModelError, match="'longrope' has a missing or invalid parameter"):
            hf("phimoe", num_key_value_heads=2, rope_scaling=rope | wrong, original_max_position_embeddings=64)


def test_gpt_oss_has_sinks_biases_and_turns() -> None:
    config = hf("gpt_oss", num_key_value_heads=2)
    biased = ExpertsConfig(8, 2, 128, router_bias=True, bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    assert config.experts == biased and config.special == ("o_bias", "sink_logits") and config.qkv_bias
    assert (config.windows, config.head_dim) == ((128, 0, 128, 0), 64)
    assert config.rope_scale == pytest.approx(0.1 * math.log(32) + 1)
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    assert hf("gpt_oss", num_key_value_heads=2, layer_types=kinds, sliding_window=8).windows == (0, 0, 0, 8)


def test_deepseek_has_latents_shared_experts_and_a_dense_front() -> None:
    sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16, "q_lora_rank": None}
    common: dict[str, Any] = {**sizes, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
    config = hf("deepseek_v2", **common, routed_scaling_factor=1.5)
    assert config.experts == ExpertsConfig(8, 2, 24, False, scale=1.5, d_shared=48, dense_layers=(0,))
    assert config.latent == LatentConfig(32, 8, 24, 16) and (config.n_kv_heads, config.head_dim) == (1, 40)
    assert len(config.rope_inv_freq) == 4 and config.attention_scale == pytest.approx(32**-0.5)
    limited = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 16}
    config = hf("deepseek_v2", **{**common, **limited})
    assert config.latent == LatentConfig(32, 8, 24, 16, 16) and config.experts is not None
    assert (config.experts.n_groups, config.experts.top_groups, config.experts.group_best) == (4, 2, 1)
    config = hf("deepseek_v3", **common, n_group=4, topk_group=2)
    assert config.experts == ExpertsConfig(
        8, 2, 24, True, "sigmoid", False, True, 4, 2, 2, 2.5, d_shared=48, dense_layers=(0,)
    )
    yarn = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    config = hf("deepseek_v2", **common, rope_scaling={**yarn, "original_max_position_embeddings": 64})
    assert config.rope_scale == 1.0
    assert config.attention_scale == pytest.approx(32**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


# What config.json of published models says, and how many weights they have, in thousands of millions.
PUBLISHED: Mapping[str, tuple[float, dict[str, Any]]] = {
    "OLMoE-1B-7B": (6.92, {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304, "clip_qkv": None, "norm_topk_prob": False,
    }),
    "Qwen1.5-MoE-A2.7B": (14.32, {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408, "num_experts": 60,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "vocab_size": 151936,
        "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "decoder_sparse_step": 1,
    }),
    "granite-3.0-1b-a400m": (1.33, {
        "model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8,
        "vocab_size": 49155, "tie_word_embeddings": True, "attention_multiplier": 0.015625, "logits_scaling": 6.0,
    }),
    "Phi-3.5-MoE": (41.87, {
        "model_type": "phimoe", "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "vocab_size": 32064,
        "attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 4096,
        "sliding_window": 131072, "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
                         "short_mscale": 1.24, "long_mscale": 1.24},
    }),
    "gpt-oss-20b": (20.91, {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "vocab_size": 201088, "swiglu_limit": 7.0, "attention_bias": True,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                         "original_max_position_embeddings": 4096},
    }),
    "DeepSeek-V2-Lite": (15.71, {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400,
        "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "pretraining_tp": 1,
    }),
    "DeepSeek-V3": (671.0, {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "moe_intermediate_size": 2048, "vocab_size": 129280,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_shared_experts": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name: str) -> None:
    expected, fields = PUBLISHED[name]
    config = config_from_hf(fields)[1]
    weights = config.d_model * (1 + config.vocab_size * (1 if config.tied else 2))
    for index in range(config.n_layers):
        shapes = {**matrix_shapes(config, index), **array_shapes(config, index)}
        weights += sum(math.prod(shape) for shape in shapes.values())
    assert weights / 1e9 == pytest.approx(expected, rel=5e-3)


def test_gguf_architectures_that_are_known_from_folders_only() -> None:
    for arch in ("gpt-oss", "phimoe"):
        with pytest.raises(ModelError, match=f"'{arch}' is not supported; give its Hugging Face folder; GGUF files"):
            gguf(arch)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 of olmoe is not supported; supported is clip_qkv=None"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True of olmoe is not supported"),
        ("olmoe", {"num_experts_per_tok": 9}, "top_k is 9 with 8 experts"),
        ("granitemoe", {"attention_bias": True}, "attention_bias=True of granitemoe"),
        ("granitemoe", {"logits_scaling": 0.0}, "wrong type"),
        ("granitemoe", {"residual_multiplier": -1.0}, "residual_scale is -1.0"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act='gelu' of qwen2_moe"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "wrong type"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "no moe_intermediate_size"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' of deepseek_v2"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' of deepseek_v2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True of deepseek_v2"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias=True of deepseek_v2"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 with latent attention is not supported"),
        ("deepseek_v2", {"kv_lora_rank": 40}, "kv_rank is 40; latent attention needs a multiple of 16"),
        ("deepseek_v3", {"n_group": 3}, "cannot be chosen"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False of deepseek_v3"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "fp8.*dequantize the checkpoint"),
        ("olmoe", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*dequantize the checkpoint"),
        ("gpt_oss", {"num_key_value_heads": 2, "swiglu_limit": -7.0}, "swiglu_limit of the experts is -7"),
        ("phimoe", {"num_key_value_heads": 2, "num_experts_per_tok": 3}, "sparsemixer chooses two"),
        ("phimoe", {"num_key_value_heads": 2, "rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic'"),
        ("phimoe", {"num_key_value_heads": 2, "router_jitter_noise": -1}, "jitter of the experts is -1"),
    ],
)
def test_what_is_not_supported_is_named(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        hf(family, **changes)
