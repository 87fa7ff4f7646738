from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.sampler import GUMBEL_SPAN, exp64, gumbel, kept, log64, philox4x32, sample
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError
from tests.sampler_vectors import VECTORS, vector_logits, vector_settings


def scaled(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float32]:
    return logits * (np.float32(1) / np.float32(sampling.temperature))


def normal(n: int, scale: float, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=n) * scale).astype(np.float32)


# Known answers that the authors of Random123 published with it.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox4x32(np.array([counter], np.uint32), key)[0].tolist() == expected


def test_log_and_exp_are_accurate() -> None:
    x = np.exp(np.random.default_rng(0).uniform(-300, 300, 20000))
    np.testing.assert_allclose(log64(x), np.log(x), rtol=1e-14, atol=1e-15)
    y = -np.random.default_rng(1).uniform(0, 700, 20000)
    np.testing.assert_allclose(exp64(y), np.exp(y), rtol=1e-14)
    assert exp64(np.array([-700.5, -np.inf, 0.0])).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("name", "function"), [("log64", log64), ("exp64", exp64)])
def test_vectors_of_functions(name: str, function: Any) -> None:
    for x, y in VECTORS[name]:
        assert float(function(np.array([float.fromhex(x)]))[0]).hex() == y


@pytest.mark.parametrize("case", VECTORS["cases"])
def test_vectors(case: dict[str, Any]) -> None:
    logits, sampling = vector_logits(case), vector_settings(case)
    assert sample(logits, sampling, case["position"]) == case["token"]
    assert float(gumbel(np.array([0]), sampling, case["position"])[0]).hex() == case["noise0"]
    if sampling.temperature > 1e-30:
        assert len(kept(logits, scaled(logits, sampling), sampling)) == case["kept"]


def test_distribution_is_softmax() -> None:
    """Pearson's chi-square over 10,000 positions; 52.6 is its 0.9999 quantile for 19 degrees of freedom."""
    logits, draws = normal(20, 1.5), 10000
    sampling = Sampling(temperature=0.8, seed=7)
    p = np.exp(logits.astype(np.float64) / 0.8)
    p /= p.sum()
    counts = np.bincount([sample(logits, sampling, i) for i in range(draws)], minlength=20)
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 52.6


def test_seed_stream_and_position_fix_the_noise() -> None:
    logits, base = normal(500, 1.0), Sampling(1.0, seed=3)
    text = [sample(logits, base, i) for i in range(64)]
    assert text == [sample(logits, base, i) for i in range(64)]
    for other in (Sampling(1.0, seed=4), Sampling(1.0, seed=3 + 2**32), Sampling(1.0, seed=3, stream=1)):
        assert text != [sample(logits, other, i) for i in range(64)]
    assert len(set(text)) > 10


def test_noise_spans_less_than_the_skip() -> None:
    """The largest and the smallest noise that 24 bits can give."""
    u = (np.array([0.0, 2.0**24 - 1]) + 0.5) * 2.0**-24
    low, high = -log64(-log64(u))
    assert 20.0 < high - low < GUMBEL_SPAN


@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 1.0), (0, 0.9), (300, 0.97)])
def test_skipping_never_changes_the_winner(scale: float, top_k: int, top_p: float) -> None:
    for seed in range(20):
        logits = normal(2000, scale, seed)
        sampling = Sampling(1.0, top_k, top_p, seed)
        z = scaled(logits, sampling)
        ids = kept(logits, z, sampling)
        score = z[ids].astype(np.float64) + gumbel(ids, sampling, seed)
        assert sample(logits, sampling, seed) == ids[np.argmax(score)]


def slow_kept(logits: NDArray[np.float32], z: NDArray[np.float32], sampling: Sampling) -> list[int]:
    """The specification of the filters, word by word."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    order = order[: sampling.top_k or len(order)]
    if sampling.top_p == 1.0:
        return sorted(order)
    weight = exp64(z.astype(np.float64) - float(z[order[0]])).tolist()
    lanes = [0.0] * 16
    for i in sorted(order):
        lanes[i % 16] += weight[i]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    running = 0.0
    for n, i in enumerate(order):
        running += weight[i]
        if running >= sampling.top_p * lanes[0]:
            return sorted(order[: n + 1])
    return sorted(order)


@pytest.mark.parametrize("top_k", [0, 1, 33, 700, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 1.0 - 2.0**-53, 1.0])
@pytest.mark.parametrize("levels", [4.0, 1000.0])  # few levels give many ties
def test_filters_are_the_specification(top_k: int, top_p: float, levels: float) -> None:
    logits = (np.round(normal(1500, 2.0, 11) * np.float32(levels)) / np.float32(levels)).astype(np.float32)
    sampling = Sampling(0.9, top_k, top_p)
    z = scaled(logits, sampling)
    assert kept(logits, z, sampling).tolist() == slow_kept(logits, z, sampling)


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    logits = np.array([-1.0, 3.0, 3.0, -np.inf], np.float32)
    assert sample(logits, Sampling(), 0) == 1
    assert sample(logits, Sampling(temperature=1e-42), 0) == 1
    assert sample(np.array([0.0, -0.0], np.float32), Sampling(), 0) == 0
    assert sample(np.array([-np.inf] * 3, np.float32), Sampling(1.0), 0) == 0
    assert sample(np.array([1.0, np.inf, np.inf], np.float32), Sampling(1.0), 0) == 1


def test_minus_infinity_is_never_chosen() -> None:
    logits = np.full(50, -np.inf, np.float32)
    logits[[7, 31]] = 0.0
    for top_p in (1.0, 0.99):
        assert {sample(logits, Sampling(100.0, top_p=top_p), i) for i in range(40)} == {7, 31}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_refused(temperature: float) -> None:
    sampling = Sampling(temperature)
    with pytest.raises(EngineError, match="token 2 is not a number"):
        sample(np.array([1.0, 2.0, np.nan, 5.0], np.float32), sampling, 0)
    shapes: list[Any] = [np.zeros(0, np.float32), np.zeros((2, 2), np.float32), np.zeros(3)]
    for wrong in shapes:
        with pytest.raises(EngineError, match="vocab_size"):
            sample(wrong, sampling, 0)
    with pytest.raises(EngineError, match="position"):
        sample(np.zeros(3, np.float32), sampling, 2**32)


def test_settings_are_checked() -> None:
    for wrong in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"seed": 2**64}, {"stream": -1}):
        with pytest.raises(EngineError):
            Sampling(**wrong)
