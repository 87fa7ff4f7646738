"""Hugging Face folders of every family, as `transformers` saves them: the same weights, shapes and rotary tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.packed import PackedMatrix  # noqa: E402
from isthmus.split.bundle import Bundle  # noqa: E402
from isthmus.split.families import HF_NAMES  # noqa: E402
from isthmus.split.manifest import TokenizerEntry  # noqa: E402
from isthmus.split.writer import write_bundle  # noqa: E402
from tests.conformance.tiny import CASES, build  # noqa: E402


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
        layer, prefix = tiny.source.layer(index), f"model.layers.{index}."
        for role in set(layer) & set(HF_NAMES):
            assert np.array_equal(plain(layer[role]), weights[prefix + HF_NAMES[role]]), role
        if config.experts:
            joined, down = (weights[f"{prefix}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
            assert np.array_equal(np.asarray(layer["router"]), weights[f"{prefix}mlp.gate.weight"])
            for e in range(config.experts.n_experts):
                both = np.concatenate([plain(layer[f"experts.{e}.gate"]), plain(layer[f"experts.{e}.up"])])
                assert np.array_equal(both, joined[e])
                assert np.array_equal(plain(layer[f"experts.{e}.down"]), down[e])
    rotary = tiny.model.model.rotary_emb
    # Two float32 power functions may round differently; 2 units in the last place are 2e-7.
    ours = np.array(config.rope_inv_freq, np.float32)
    assert np.allclose(ours, rotary.inv_freq.numpy(), rtol=2.5e-7, atol=0)
    assert config.rope_scale == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(("dtype", "format"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_precision_is_kept(dtype: Any, format: str, tmp_path: Path) -> None:
    tiny = build("qwen2", tmp_path, dtype=dtype)
    layer = tiny.source.layer(0)
    assert isinstance(layer["up"], PackedMatrix) and layer["up"].format == format
    expected = tiny.model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    assert np.array_equal(plain(layer["up"]), expected)
    assert np.asarray(layer["q_bias"]).dtype == np.float32


@pytest.mark.parametrize("case", ["qwen2", "qwen3_moe"])
def test_a_bundle_gives_the_same(case: str, tmp_path: Path) -> None:
    tiny = build(case, tmp_path / "hf")
    write_bundle(tmp_path / "b", tiny.source, name=case, weights="keep", tokenizer=b"{}", entry=TokenizerEntry())
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.config == tiny.source.config
    expected, found = tiny.source.layer(2), bundle.layer(2)
    assert set(found) == set(expected)
    assert all(np.array_equal(plain(found[name]), plain(value)) for name, value in expected.items())
