"""Configurations as JSON: what came later leaves ids of older bundles alone, and nonsense is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from isthmus.engine.config import SPECIAL, DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.protocol.errors import EngineError
from isthmus.split.manifest import model_id

PLAIN = DecoderConfig("mixtral", 2, 32, 4, 2, 8, 48, 64, 128, 1e-5, (1.0, 0.5, 0.25, 0.125), windows=(0, 8))
EXPERTS = ExpertsConfig(4, 2, 16)
LATENT = LatentConfig(kv_rank=16, d_rotated=8, d_plain=12, d_value=16)
BEFORE = (
    '{"family": "mixtral", "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, '
    '"vocab_size": 64, "context_length": 128, "norm_eps": 1e-05, "rope_inv_freq": [1.0, 0.5, 0.25, 0.125], '
    '"rope_scale": 1.0, "qkv_bias": false, "qk_norm": false, "windows": [0, 8], "tied": false, '
    '"experts": {"n_experts": 4, "top_k": 2, "d_expert": 16, "renormalize": true}}'
)


def test_what_came_later_leaves_older_bundles_alone() -> None:
    """Byte for byte what the first versions wrote, and so the same model_id."""
    config = replace(PLAIN, experts=EXPERTS)
    assert json.dumps(config.to_dict()) == BEFORE
    assert model_id(config, {}) == "ad432df4ca17d24a81b48970ec108000"
    assert DecoderConfig.from_dict(json.loads(BEFORE)) == config and not config.special


def test_every_field_survives_json() -> None:
    experts = ExpertsConfig(8, 2, 16, False, "sigmoid", True, True, 4, 2, 2, 2.5, 0.0, 24, True, True, 1.7, 7.0, (1,))
    changes: dict[str, Any] = {"qk_norm_whole": True, "layer_norm": True, "o_bias": True, "head_bias": True}
    changes |= {"sink_logits": True, "embedding_scale": 12.0, "attention_scale": 0.1, "residual_scale": 0.2}
    one = replace(PLAIN, experts=experts, logit_scale=0.5, **changes)
    two = replace(PLAIN, n_kv_heads=1, head_dim=24, attention_scale=0.2, latent=LATENT)
    assert {*one.special, *two.special} == set(SPECIAL)
    for config in (one, two):
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert set(config.to_dict()) >= set(config.special)
    assert one.experts_of(0) is experts and one.experts_of(1) is None and PLAIN.experts_of(0) is None
    assert (two.rotated, two.attention_out, one.rotated, one.attention_out) == (8, 64, 8, 32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 5}, "top_k is 5 with 4 experts"),
        ({"n_experts": 5000}, "top_k is 2 with 5000 experts"),
        ({"score": "entmax"}, "score is 'entmax'"),
        ({"n_groups": 3}, "cannot be chosen"),
        ({"n_groups": 4, "top_groups": 1}, "cannot be chosen"),
        ({"n_groups": 2, "group_best": 3}, "cannot be chosen"),
        ({"score": "sparsemixer"}, "sparsemixer chooses two"),
        ({"score": "sparsemixer", "renormalize": False, "top_k": 1}, "sparsemixer chooses two"),
        ({"scale": 0.0}, "scale of the experts is 0.0"),
        ({"jitter": -1.0}, "jitter of the experts is -1.0"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit of the experts is nan"),
        ({"shared_gate": True}, "no shared expert"),
        ({"d_shared": -1}, "shared one -1"),
        ({"dense_layers": (1, 0)}, "dense layers are"),
    ],
)
def test_experts_that_are_none(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        ExpertsConfig(**{**asdict(EXPERTS), **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"attention_scale": -1.0}, "attention_scale is -1.0"),
        ({"qk_norm": True, "qk_norm_whole": True}, "norm over all heads"),
        ({"experts": replace(EXPERTS, dense_layers=(2,))}, "layer 2 is dense"),
        ({"latent": LATENT}, "latent attention with 2 KV heads of 8|rotary frequencies"),
        ({"latent": LATENT, "n_kv_heads": 1, "head_dim": 24}, "latent attention with 1 KV heads of 24"),
        (
            {"latent": LATENT, "n_kv_heads": 1, "head_dim": 24, "attention_scale": 1.0, "qkv_bias": True},
            "no biases, head norms or sinks",
        ),
    ],
)
def test_decoders_that_are_none(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    "changes", [{"kv_rank": 24}, {"d_value": 8}, {"d_rotated": 0}, {"q_rank": -1}, {"norm_eps": 0.0}]
)
def test_latents_that_are_none(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=next(iter(changes))):
        replace(LATENT, **changes)
