"""Hugging Face folders of every family, as `transformers` saves them: the same weights, shapes and rotary tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from isthmus.engine.config import LatentConfig  # noqa: E402
from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.packed import PackedMatrix  # noqa: E402
from isthmus.split.bundle import Bundle  # noqa: E402
from isthmus.split.checkpoints import open_checkpoint  # noqa: E402
from isthmus.split.hf_config import HF_NAMES  # noqa: E402
from isthmus.split.manifest import TokenizerEntry  # noqa: E402
from isthmus.split.writer import write_bundle  # noqa: E402
from tests.conformance.tiny import CASES, build  # noqa: E402

LATENT = ("q", "latent", "k_up", "v_up")


def plain(weight: object) -> np.ndarray:
    return dequantize(weight) if isinstance(weight, PackedMatrix) else np.asarray(weight)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_rotary_tables(case: str, tmp_path: Path) -> None:
    tiny = build(case, tmp_path, shards=True)
    config, weights = tiny.source.config, {name: w.numpy() for name, w in tiny.model.state_dict().items()}
    assert config.tied == bool(tiny.model.config.tie_word_embeddings)
    assert np.array_equal(plain(tiny.source.embedding()), weights["model.embed_tokens.weight"])
    assert np.array_equal(plain(tiny.source.head()), weights["lm_head.weight"])
    assert np.array_equal(tiny.source.final_norm(), weights["model.norm.weight"])
    for index in range(config.n_layers):
        layer, prefix = dict(tiny.source.layer(index)), f"model.layers.{index}."
        if config.latent:
            check_latent(config.latent, {role: plain(layer.pop(role)) for role in LATENT}, prefix, weights)
        for role in set(layer) & set(HF_NAMES):
            assert np.array_equal(plain(layer[role]), weights[prefix + HF_NAMES[role]]), role
        experts = config.experts_of(index)
        if experts:
            block = prefix + ("block_sparse_moe" if config.family == "granitemoe" else "mlp")
            router = next(name for name in weights if re.match(rf"{block}\.(gate|router)\.weight", name))
            assert np.array_equal(np.asarray(layer["router"]), weights[router])
            joined, down = (weights[f"{block}.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
            for e in range(experts.n_experts):
                gate, up = (plain(layer[f"experts.{e}.{name}"]) for name in ("gate", "up"))
                both = np.concatenate([gate, up])
                if config.family == "gpt_oss":
                    both = np.stack([gate, up], 1).reshape(both.shape).T
                assert np.array_equal(both, joined[e])
                found = plain(layer[f"experts.{e}.down"])
                assert np.array_equal(found.T if config.family == "gpt_oss" else found, down[e])
    rotary = tiny.model.model.rotary_emb
    # Two float32 power functions may round differently; 2 units in the last place are 2e-7.
    ours = np.array(config.rope_inv_freq, np.float32)
    assert np.allclose(ours, rotary.inv_freq.numpy(), rtol=2.5e-7, atol=0)
    scale = tiny.model.config.rope_parameters.get("short_mscale", rotary.attention_scaling)
    assert config.rope_scale == pytest.approx(scale, rel=1e-12)


def check_latent(c: LatentConfig, layer: dict[str, np.ndarray], prefix: str, weights: dict[str, np.ndarray]) -> None:
    """Each head's maps to keys and values, and rotated halves that follow each other instead of taking turns."""
    both = weights[f"{prefix}self_attn.kv_b_proj.weight"].reshape(-1, c.d_plain + c.d_value, c.kv_rank)
    keys = layer["k_up"].reshape(len(both), c.kv_rank, c.d_plain)
    assert np.array_equal(keys.transpose(0, 2, 1), both[:, : c.d_plain])
    assert np.array_equal(layer["v_up"].reshape(len(both), c.d_value, c.kv_rank), both[:, c.d_plain :])
    queries = weights[f"{prefix}self_attn.{'q_b_proj' if c.q_rank else 'q_proj'}.weight"]
    for found, theirs, before in (
        (layer["q"].reshape(len(both), c.d_plain + c.d_rotated, -1), queries, c.d_plain),
        (layer["latent"][None], weights[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"], c.kv_rank),
    ):
        expected = theirs.reshape(found.shape)
        turns = np.stack(np.split(found[:, before:], 2, axis=1), 2).reshape(found[:, before:].shape)
        assert np.array_equal(found[:, :before], expected[:, :before]) and np.array_equal(turns, expected[:, before:])


@pytest.mark.parametrize(("dtype", "format"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_precision_is_kept(dtype: Any, format: str, tmp_path: Path) -> None:
    tiny = build("qwen2", tmp_path, dtype=dtype)
    layer = tiny.source.layer(0)
    assert isinstance(layer["up"], PackedMatrix) and layer["up"].format == format
    expected = tiny.model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    assert np.array_equal(plain(layer["up"]), expected)
    assert np.asarray(layer["q_bias"]).dtype == np.float32


@pytest.mark.parametrize("format", ["keep", "nested"])
@pytest.mark.parametrize("case", ["qwen2", "qwen3_moe", "qwen2_moe-dense", "phimoe", "gpt_oss", "deepseek_v3"])
def test_a_bundle_gives_the_same(case: str, format: str, tmp_path: Path) -> None:
    build(case, tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf", format=format)
    write_bundle(tmp_path / "b", source, name=case, weights=format, tokenizer=b"{}", entry=TokenizerEntry())
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.config == source.config
    expected, found = source.layer(2), bundle.layer(2)
    assert set(found) == set(expected)
    assert all(np.array_equal(plain(found[name]), plain(value)) for name, value in expected.items())
