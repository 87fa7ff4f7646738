"""How near logits come to float32, which stands beside each speed."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.apps.bench.contenders import Engine, logits_along
from isthmus.apps.bench.quality import InFloat, Quality, float_bytes, greedy
from isthmus.engine.binding import cpu_names
from isthmus.quant.groups import dequantize
from tests.native_tools import open_part
from tests.random_model import RandomModel, random_config

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
PROMPTS = [[1, 2, 3], [50, 4, 7, 9, 90]]


def test_a_model_in_float_is_its_own_yardstick() -> None:
    model = RandomModel("f32")
    part = open_part(model, format="f32")
    quality = Quality(model, PROMPTS, 12)
    assert abs(quality.cosine(Engine("float", part)) - 1) < 1e-6
    other = Engine("another model", open_part(RandomModel("f32", seed=1)))
    assert quality.cosine(other) < 0.9


def test_rounding_costs_a_little() -> None:
    model = RandomModel("q4")
    assert 0.9 < Quality(model, PROMPTS, 12).cosine(Engine("q4", open_part(model))) < 0.999999


def test_logits_are_those_of_decoding() -> None:
    part = open_part(RandomModel("q4"))
    answer = greedy(part, PROMPTS[1], 8)
    logits = logits_along(part, PROMPTS[1], answer)
    assert logits.shape == (8, 101) and logits.argmax(axis=1).tolist() == answer
    assert logits_along(part, PROMPTS[1], answer[:1]).tobytes() == logits[:1].tobytes()
    assert part.free_tokens == 1024


def test_the_float_copy_loses_nothing() -> None:
    model = RandomModel("q4m", random_config(full=True))
    copy = InFloat(model)
    for name, weight in model.layers[0].items():
        found = copy.layer(0)[name]
        if isinstance(weight, np.ndarray):
            assert found is weight
        else:
            assert np.array_equal(dequantize(found), dequantize(weight))  # type: ignore[arg-type]
    assert copy.head().format == "f32" and copy.config is model.config
    whole = sum(w.nbytes for w in copy.layer(0).values()) * 3 + copy.embedding().nbytes
    assert 0.5 < float_bytes(model.config) / whole < 1.1
