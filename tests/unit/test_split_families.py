"""Families from config.json: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.engine.config import ExpertsConfig
from isthmus.protocol.errors import ModelError
from isthmus.split.families import FAMILIES
from isthmus.split.gguf_config import config_from_gguf
from isthmus.split.hf_config import config_from_hf
from isthmus.split.manifest import FAMILIES as BUNDLED
from isthmus.split.places import half_rotated_rows
from isthmus.split.rope import plain, rope_frequencies

BASE = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
    "intermediate_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
GGUF = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
    "llama.attention.head_count": 4, "llama.context_length": 512, "llama.feed_forward_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SHAPES = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def hf(**changes: Any) -> Any:
    return config_from_hf({**BASE, **changes})[1]


def gguf(arch: str = "llama", **changes: Any) -> Any:
    fields = {key.replace("llama.", f"{arch}."): value for key, value in GGUF.items()} | {"general.architecture": arch}
    return config_from_gguf(fields | {key.replace("__", "."): value for key, value in changes.items()}, SHAPES)[1]


def test_bundles_and_checkpoints_know_the_same_families() -> None:
    assert sorted(FAMILIES) == sorted(BUNDLED)


def test_defaults_of_an_old_config() -> None:
    config = hf()
    assert (config.n_kv_heads, config.head_dim, config.tied, config.windows) == (4, 16, False, ())
    assert np.array_equal(np.array(config.rope_inv_freq, np.float32), plain(16, 10000.0))
    assert hf(model_type="qwen3").head_dim == 128
    assert hf(model_type="mixtral", num_key_value_heads=2).experts == ExpertsConfig(8, 2, 128, True)
    assert hf(model_type="mixtral", num_key_value_heads=2).rope_inv_freq[1] == pytest.approx(1e6 ** (-2 / 16))


def test_both_ways_to_write_rope() -> None:
    old = hf(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    new = hf(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0})
    assert old.rope_inv_freq == new.rope_inv_freq
    assert np.allclose(old.rope_inv_freq, plain(16, 5e5) / 4)


def test_windows() -> None:
    assert hf(model_type="mistral", num_key_value_heads=2).windows == (4096, 4096)
    assert hf(model_type="mistral", num_key_value_heads=2, sliding_window=None).windows == ()
    assert hf(model_type="mistral", num_key_value_heads=2, sliding_window=8).windows == (8, 8)
    assert hf(model_type="qwen2", sliding_window=8).windows == ()
    assert hf(model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1).windows == (0, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert hf(model_type="qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds).windows == (8, 0)
    assert hf(sliding_window=8).windows == ()


def test_flags_and_experts() -> None:
    assert hf(model_type="qwen2").qkv_bias and not hf(model_type="qwen2").qk_norm
    assert hf(model_type="qwen3").qk_norm and not hf(model_type="qwen3").qkv_bias
    for key in ("num_experts", "num_local_experts"):
        config = hf(model_type="qwen3_moe", moe_intermediate_size=24, num_experts_per_tok=3, **{key: 5})
        assert config.experts == ExpertsConfig(5, 3, 24, False)
    assert hf(tie_word_embeddings=True).tied
    assert config_from_hf(BASE, has_head=False)[1].tied


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "family 'mamba' is not supported; supported are llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' of llama is not supported; supported is hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported; supported are default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "missing or invalid parameter"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of each head"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "do not share"),
        ({"hidden_size": "wide"}, "wrong type"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 2}, "chunked"),
        ({"model_type": "mixtral", "mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        hf(**changes)
    assert caught.value.remedy or "share" in says
    with pytest.raises(ModelError, match="no 'hidden_size'"):
        config_from_hf({key: value for key, value in BASE.items() if key != "hidden_size"})


def test_gguf_metadata() -> None:
    assert gguf().family == "llama" and not gguf().tied and gguf().vocab_size == 100
    assert gguf("qwen2").qkv_bias and gguf("qwen3").qk_norm
    assert gguf("qwen3", qwen3__attention__key_length=32, qwen3__attention__value_length=32).head_dim == 32
    assert gguf(llama__attention__sliding_window=16).windows == (16, 16)
    assert gguf(llama__expert_count=4, llama__expert_used_count=2).experts == ExpertsConfig(4, 2, 128, True)
    moe = gguf(
        "qwen3moe", qwen3moe__expert_count=4, qwen3moe__expert_used_count=2, qwen3moe__expert_feed_forward_length=24
    )
    assert (moe.family, moe.experts) == ("qwen3_moe", ExpertsConfig(4, 2, 24, True))
    assert gguf(llama__attention__head_count_kv=np.array([2, 2])).n_kv_heads == 2
    linear = gguf(llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    assert np.allclose(linear.rope_inv_freq, plain(16, 10000.0) / 2)


@pytest.mark.parametrize("value", ["x", float("nan"), [[1], [2]], ["a"], [1, 2]])
@pytest.mark.parametrize("name", ["expert_count", "attention__sliding_window", "block_count", "rope__freq_base"])
def test_gguf_metadata_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=r"wrong type|differs between layers|invalid parameter"):
        gguf(**{f"llama__{name}": value})


def test_a_window_that_is_none() -> None:
    for window in (-1, 2**31, 10**30):
        with pytest.raises(ModelError, match=f"an attention window of {window}"):
            gguf(llama__attention__sliding_window=window)
        with pytest.raises(ModelError, match=f"an attention window of {window}"):
            hf(model_type="mistral", num_key_value_heads=2, sliding_window=window)


def test_gguf_rope_factors_divide_the_frequencies() -> None:
    factors = np.linspace(1, 8, 8).astype(np.float32)
    config = config_from_gguf(GGUF, SHAPES, factors)[1]
    assert np.array_equal(np.array(config.rope_inv_freq, np.float32), plain(16, 10000.0) / factors)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight has shape"):
        config_from_gguf(GGUF, SHAPES, factors[:3])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llama__attention__head_count": np.array([2, 4])}, "differs between layers"),
        ({"llama__attention__value_length": 8}, "different sizes"),
        ({"llama__rope__dimension_count": 8}, "part of each head"),
        ({"llama__rope__scaling__type": "su", "llama__rope__scaling__factor": 2.0}, "'su' is not supported"),
        (
            {"general__architecture": "gemma3"},
            "'gemma3' is not supported; supported are deepseek2, granitemoe, llama",
        ),
        ({"llama__block_count": None}, "no llama.block_count"),
    ],
)
def test_gguf_metadata_that_are_not_supported(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        gguf(**changes)


def test_yarn_keeps_fast_and_divides_slow_dimensions() -> None:
    params = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    frequencies, scale = rope_frequencies(128, 1e6, 32768, params)
    base = plain(128, 1e6)
    assert frequencies[0] == base[0] and frequencies[-1] == pytest.approx(base[-1] / 4)
    assert scale == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_rows_of_interleaved_heads() -> None:
    # Two heads of 4: the file has pairs (0,2) (1,3) of each head side by side.
    assert half_rotated_rows(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
