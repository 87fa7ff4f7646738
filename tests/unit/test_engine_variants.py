"""What decoders have beyond the plain one, each on every kernel family: the same bits however rows are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.config import DecoderConfig, ExpertsConfig, LatentConfig
from isthmus.protocol.errors import EngineError
from tests.native_tools import kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import paged, record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
PLAIN = random_config(full=False)
EXPERTS = ExpertsConfig(n_experts=8, top_k=3, d_expert=40)
LATENT = LatentConfig(kv_rank=32, d_rotated=6, d_plain=20, d_value=16, q_rank=40)


def latent(d: LatentConfig, experts: ExpertsConfig | None) -> DecoderConfig:
    return replace(
        PLAIN,
        rope_inv_freq=PLAIN.rope_inv_freq[: d.d_rotated // 2],
        n_kv_heads=1,
        head_dim=d.kv_rank + d.d_rotated,
        attention_scale=0.2,
        latent=d,
        experts=experts,
    )


CASES: Mapping[str, DecoderConfig] = {
    "whole-norm": replace(PLAIN, qk_norm_whole=True, experts=replace(EXPERTS, renormalize=False)),
    "factors": replace(PLAIN, embedding_scale=3.0, residual_scale=0.4, logit_scale=0.5, attention_scale=0.1),
    "factors-shared": replace(PLAIN, residual_scale=0.4, experts=replace(EXPERTS, d_shared=56, shared_gate=True)),
    "groups": replace(
        PLAIN,
        experts=replace(
            EXPERTS,
            score="sigmoid",
            choice_bias=True,
            n_groups=4,
            top_groups=2,
            group_best=2,
            scale=2.5,
            d_shared=24,
            dense_layers=(0,),
        ),
    ),
    "softmax-groups": replace(PLAIN, experts=replace(EXPERTS, n_groups=2, choice_bias=True, renormalize=False)),
    "biased": replace(
        PLAIN,
        o_bias=True,
        qkv_bias=True,
        sink_logits=True,
        windows=(7, 0, 7),
        experts=replace(EXPERTS, router_bias=True, bias=True, swiglu_alpha=1.702, swiglu_limit=0.8),
    ),
    "sparse": replace(
        PLAIN,
        layer_norm=True,
        head_bias=True,
        o_bias=True,
        experts=ExpertsConfig(6, 2, 40, False, "sparsemixer", jitter=0.1),
    ),
    "layer-norm": replace(PLAIN, layer_norm=True, o_bias=True, residual_scale=0.3, sink_logits=True),
    "latent": latent(LATENT, replace(EXPERTS, d_shared=24)),
    "latent-dense": latent(replace(LATENT, q_rank=0, kv_rank=48, d_value=32), None),
}
TEXT = some_tokens(40)


@pytest.fixture(
    scope="module", params=[(case, format) for case in CASES for format in ("q4", "f32", "n8")], ids="-".join
)
def model(request: pytest.FixtureRequest) -> RandomModel:
    case, format = request.param
    return RandomModel(format, CASES[case])


def test_no_bit_depends_on_how_rows_are_computed(model: RandomModel) -> None:
    whole = open_part(model, cpu="plain")
    one = whole.open()
    expected = run_tokens(whole, one, TEXT, [40])
    for cpu in cpu_names():
        for threads, steps in ((1, [1] * 40), (2, [13, 1, 26]), (3, [1] * 5 + [35])):
            part = open_part(model, cpu=cpu, threads=threads)
            sequence = part.open()
            found = run_tokens(part, sequence, TEXT, steps)
            assert found[0].tobytes() == expected[0].tobytes() and found[1].tobytes() == expected[1].tobytes()
            assert found[2] == expected[2] and kv_bytes(sequence) == kv_bytes(one)
            part.close()
    assert np.isfinite(expected[0]).all() and expected[0].std() > 1e-3


@pytest.mark.parametrize("case", ["latent", "latent-dense", "biased", "whole-norm"])
def test_a_sliding_window_with_sinks_goes_on(case: str) -> None:
    """Past the end of what is kept, with the first positions in sight: the same bits in steps of any size."""
    model, text, results = RandomModel("f32", CASES[case]), some_tokens(150), []
    for steps in ([1] * 150, [32] * 4 + [22], [30, 1, 1, 32, 32, 32, 22]):
        part = open_part(model, threads=2, max_tokens=144, format="f32")
        results.append(run_tokens(part, part.open(window=48), text, steps))
        part.close()
    for found in results[1:]:
        assert found[0].tobytes() == results[0][0].tobytes() and found[2] == results[0][2]
    whole = open_part(model, format="f32")
    seen, _, _ = run_tokens(whole, whole.open(), text, [150])
    assert np.array_equal(seen[:48], results[0][0][:48]) and not np.allclose(seen[149], results[0][0][149])


@pytest.mark.parametrize("case", [name for name, config in CASES.items() if config.experts])
def test_experts_that_come_late_have_their_biases(case: str, tmp_path: Path) -> None:
    model = RandomModel("q4", CASES[case])
    whole, bundle = open_part(model), stored(model, tmp_path / "bundle")
    expected = run_tokens(whole, whole.open(), TEXT, [40])
    with paged(bundle, 5 * record_bytes(bundle), threads=2) as (part, _):
        for steps in ([40], [1] * 40):
            found = run_tokens(part, part.open(), TEXT, steps)
            assert found[0].tobytes() == expected[0].tobytes() and found[2] == expected[2]


def test_a_missing_weight_is_named() -> None:
    for case, name, says in (
        ("biased", "sink_logits", "'sink_logits' of layer 1 is missing"),
        ("biased", "gate_bias", "'gate_bias' of layer 1 is missing, not of shape"),
        ("latent", "k_up", "layer 1 has no 'k_up'"),
        ("latent", "shared.up", "layer 1 has no 'shared.up'"),
        ("factors-shared", "shared_gate", "'shared_gate' of layer 1 is missing"),
    ):
        model = RandomModel("q4", CASES[case])
        del model.layers[1][name]
        with pytest.raises(EngineError, match=says):
            open_part(model)
