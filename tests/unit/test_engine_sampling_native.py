"""The C sampler against the numpy one, and as the last act of a step."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.binding import cpu_names, native
from isthmus.engine.part import Rows, Want
from isthmus.engine.sampler import sample
from isthmus.engine.sampling import GREEDY, Sampling
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel
from tests.sampler_vectors import VECTORS, vector_logits, vector_settings

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")


def native_sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    module = native()
    s = module.ffi.new("im_sampling *")
    s.temperature, s.top_k, s.top_p = sampling.temperature, sampling.top_k, sampling.top_p
    s.seed, s.stream = sampling.seed, sampling.stream
    found = module.lib.im_sample_one(module.ffi.cast("float *", logits.ctypes.data), len(logits), s, position)
    return int(found)


def settings() -> list[Sampling]:
    """Every combination of ordinary and extreme filters, each with a seed and stream of its own."""
    combinations = product((0.05, 0.7, 1.0, 3.0, 100.0), (0, 1, 2, 40, 10**6), (1e-9, 0.3, 0.9, 0.999, 1.0))
    return [Sampling(t, k, p, 0x9E3779B97F4A7C15 * i % 2**64, i) for i, (t, k, p) in enumerate(combinations)]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 255, 256, 257, 3001])
@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "holes"])
def test_choices_are_the_numpy_samplers(size: int, kind: str) -> None:
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal(size) * 4).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits).astype(np.float32)
    elif kind == "flat":
        logits[:] = -3.25
    elif kind == "holes":
        logits[rng.random(size) < 0.5] = -np.inf
    for i, sampling in enumerate(settings()):
        for position in (i, 2**32 - 1 - i):
            expected = sample(logits, sampling, position)
            assert native_sample(logits, sampling, position) == expected, (sampling, position)
    assert native_sample(logits, GREEDY, 0) == sample(logits, GREEDY, 0)


def test_positions_draw_different_tokens() -> None:
    logits = np.zeros(64, np.float32)
    drawn = {native_sample(logits, Sampling(1.0, seed=1), position) for position in range(600)}
    assert drawn == set(range(64))  # one of 64 is missing in 600 draws with probability 0.005; the seed is fixed


def test_vectors() -> None:
    assert len(VECTORS["cases"]) > 50
    for case in VECTORS["cases"]:
        assert native_sample(vector_logits(case), vector_settings(case), case["position"]) == case["token"], case


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_samples_each_row_with_its_own_settings(threads: int) -> None:
    """Rows of one step, each with its settings and position, some beside logits and some without."""
    part = open_part(RandomModel("q4"), threads=threads, max_tokens=2048)
    text, different = some_tokens(90), settings()
    trunk = part.open()
    logits, _, _ = run_tokens(part, trunk, text, [90])
    for steps in ([1] * 90, [90]):  # one row a step, and 90 rows through the head at once
        at = 0
        for n in steps:
            sequences = [trunk.fork() for _ in range(n)]
            rows, expected = Rows(), []
            for i, sequence in enumerate(sequences):
                position = at + i
                sequence.truncate(position)
                want = Want.SAMPLE | (Want.LOGITS if i % 3 == 0 else Want.NONE)
                sampling = different[position % len(different)] if position % 4 else GREEDY
                rows.tokens(sequence, position, text[position : position + 1], want=want, sampling=sampling)
                expected.append(sample(logits[position], sampling, position))
            result = part.step(rows)
            assert result.tokens == expected
            assert result.logits.tobytes() == logits[at : at + n : 3].tobytes()
            for sequence in sequences:
                sequence.close()
            at += n
