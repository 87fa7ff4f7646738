"""DeepSeek in GGUF files, named and laid out as llama.cpp's converter does it: the weights of their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.packed import PackedMatrix  # noqa: E402
from isthmus.split.checkpoints import open_checkpoint  # noqa: E402
from tests.conformance.tiny import Tiny, build  # noqa: E402

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write(tiny: Tiny, path: Path, *, old: bool) -> None:
    """A GGUF file of a tiny DeepSeek; `old` as converters wrote latent attention at first."""
    c = tiny.model.config
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        writer.add_q_lora_rank(c.q_lora_rank)
    lengths = {"key_length": c.qk_nope_head_dim + c.qk_rope_head_dim, "value_length": c.v_head_dim}
    if not old:
        lengths = {f"{name}_mla": n for name, n in lengths.items()}
        lengths |= {"key_length": c.kv_lora_rank + c.qk_rope_head_dim, "value_length": c.kv_lora_rank}
    for name, n in lengths.items():
        writer.add_uint32(f"deepseek2.attention.{name}", n)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    v3 = c.model_type == "deepseek_v3"
    writer.add_expert_weights_norm(v3 and c.norm_topk_prob)
    writer.add_uint32("deepseek2.expert_gating_func", 2 if v3 else 1)
    if c.n_group:
        writer.add_uint32("deepseek2.expert_group_count", c.n_group)
        writer.add_uint32("deepseek2.expert_group_used_count", c.topk_group)
    rope = c.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_string("deepseek2.rope.scaling.type", "yarn")
        writer.add_float32("deepseek2.rope.scaling.factor", rope["factor"])
        writer.add_uint32("deepseek2.rope.scaling.original_context_length", rope["original_max_position_embeddings"])
        writer.add_float32("deepseek2.rope.scaling.yarn_log_multiplier", 0.1 * rope["mscale_all_dim"])
    for name, tensor in tensors(tiny, old=old).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(tiny: Tiny, *, old: bool) -> dict[str, np.ndarray]:
    c, weights = tiny.model.config, {name: w.numpy() for name, w in tiny.model.state_dict().items()}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i in range(c.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"blk.{i}."
        for name, short in NAMES.items():
            if f"{theirs}{name}.weight" in weights:
                found[f"{ours}{short}.weight"] = weights[f"{theirs}{name}.weight"]
        both = weights[f"{theirs}self_attn.kv_b_proj.weight"]
        heads = both.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        if old:
            found[f"{ours}attn_kv_b.weight"] = both
        else:
            found[f"{ours}attn_k_b.weight"] = heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
            found[f"{ours}attn_v_b.weight"] = heads[:, c.qk_nope_head_dim :]
        if f"{theirs}mlp.experts.gate_up_proj" in weights:
            gate, up = np.split(weights[f"{theirs}mlp.experts.gate_up_proj"], 2, axis=1)
            down = weights[f"{theirs}mlp.experts.down_proj"]
            found |= {f"{ours}ffn_{x}_exps.weight": w for x, w in (("gate", gate), ("up", up), ("down", down))}
        if f"{theirs}mlp.gate.e_score_correction_bias" in weights:
            found[f"{ours}exp_probs_b.bias"] = weights[f"{theirs}mlp.gate.e_score_correction_bias"]
    return found


def plain(weight: object) -> np.ndarray:
    return dequantize(weight) if isinstance(weight, PackedMatrix) else np.asarray(weight)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v2-groups", "deepseek_v3", "deepseek_v3-plain"])
def test_a_gguf_file_is_its_folder(case: str, old: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rope_parameters": YARN} if case == "deepseek_v2-groups" else {}
    tiny = build(case, tmp_path / "hf", **settings)
    write(tiny, tmp_path / "m.gguf", old=old)
    source, expected = open_checkpoint(tmp_path / "m.gguf"), tiny.source
    ours, theirs = (json.loads(json.dumps(one.config.to_dict())) for one in (source, expected))
    for name in ("rope_inv_freq", "attention_scale", "norm_eps"):
        assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-6)
    assert ours["latent"].pop("norm_eps") == pytest.approx(theirs["latent"].pop("norm_eps"))
    assert ours == theirs
    for index in range(expected.config.n_layers):
        found = source.layer(index)
        for role, value in expected.layer(index).items():
            assert np.array_equal(plain(found[role]), plain(value)), role


# The published models' two magnitudes are equal, which is all that a GGUF header can say.
YARN = {
    "rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}  # fmt: skip
