"""Tiny random models of every family, saved by `transformers` as a folder and read back as a `WeightSource`.

tiny = build("qwen3", tmp_path)      # any of CASES
tiny.model                           # the transformers model, float32, eval
tiny.source                          # the same weights through isthmus.split
tiny.logits([[1, 2, 3]])             # transformers' logits [1, 3, vocab] f32
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from isthmus.split.checkpoints import Checkpoint, open_checkpoint

VOCAB = 160
_BASE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def _rope(**params: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **params}}


_LLAMA3 = _rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_YARN = _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

_LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip

# name -> (transformers' model_type, settings beside _BASE)
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-odd": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 40},
    ),
    "llama-wide": ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "llama3-rope": ("llama", _LLAMA3),
    "llama-linear": ("llama", _rope(rope_type="linear", factor=2.0)),
    "llama-yarn": ("llama", _YARN),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
         "head_dim": 32},
    ),
    "qwen3_moe-plain": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": False,
         "head_dim": 16},
    ),
    "qwen3_moe-sparse": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
         "head_dim": 16, "decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
         "shared_expert_intermediate_size": 80},
    ),
    "qwen2_moe-dense": (
        "qwen2_moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True,
         "shared_expert_intermediate_size": 120, "mlp_only_layers": [0], "qkv_bias": False},
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-normed": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_size": 72,
                               "num_attention_heads": 9, "num_key_value_heads": 3}),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
         "residual_multiplier": 0.22, "attention_multiplier": 0.0625},
    ),
    "granitemoe-plain": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3, "tie_word_embeddings": True},
    ),
    "phimoe": (
        "phimoe",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
         "router_jitter_noise": 0.2},
    ),
    "phimoe-longrope": (
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "hidden_size": 72,
         "num_attention_heads": 9, "num_key_value_heads": 3, "router_jitter_noise": 0.01,
         **_rope(rope_type="longrope", short_factor=[1.0, 1.25, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0, 5.0],
                 short_mscale=1.2, long_mscale=1.3, original_max_position_embeddings=64)},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 8,
         **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)},
    ),
    "gpt_oss-clamped": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 24, "sliding_window": 5, "swiglu_limit": 0.75,
         "num_attention_heads": 8, "intermediate_size": 40, "attention_bias": False,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
         "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {**_LATENT, "qk_rope_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
         "topk_group": 2, "topk_method": "group_limited_greedy", "moe_intermediate_size": 32, "n_shared_experts": 1,
         "q_lora_rank": 40, "first_k_dense_replace": 0,
         **_rope(rope_type="yarn", factor=4.0, mscale=0.707, mscale_all_dim=0.9,
                 original_max_position_embeddings=64)},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
         "moe_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 24, "first_k_dense_replace": 1,
         "num_mtp_layers": 0},
    ),
    "deepseek_v3-plain": (
        "deepseek_v3",
        {**_LATENT, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 40, "n_shared_experts": 2, "q_lora_rank": None, "first_k_dense_replace": 0,
         "norm_topk_prob": False, "num_mtp_layers": 0},
    ),
}  # fmt: skip
DENSE = tuple(name for name, (_, settings) in CASES.items() if not any("experts" in key for key in settings))


@dataclass(frozen=True)
class Tiny:
    """A tiny model in both forms."""

    folder: Path
    model: Any
    source: Checkpoint

    def logits(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """transformers' logits [batch, positions, vocab_size]."""
        with torch.no_grad():
            return np.asarray(self.model(torch.tensor(tokens)).logits.numpy())

    def hidden(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The hidden state before each layer, n_layers of [batch, positions, d_model]."""
        with torch.no_grad():
            states = self.model(torch.tensor(tokens), output_hidden_states=True).hidden_states
        return [np.asarray(state.numpy()) for state in states[:-1]]


def build(
    case: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shards: bool = False, **settings: Any
) -> Tiny:
    """Makes, saves and reads back a model of CASES.

    Args:
        folder: where the checkpoint is written.
        dtype: precision of the saved weights; the model is brought back to float32 afterwards.
        shards: whether it is saved in several files with an index.
        settings: entries of config.json instead of the case's.
    """
    kind, own = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **{**_BASE, **own, **settings}, attn_implementation="eager")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                else:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            for name, buffer in model.named_buffers():
                if name.endswith("bias"):
                    buffer.normal_(0, 0.3)
        model = model.to(dtype)
        model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    model = model.to(torch.float32).eval()
    return Tiny(folder, model, open_checkpoint(folder))


def config_json(folder: Path) -> dict[str, Any]:
    """The config.json of a saved model."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
