"""Certificates: what is promised holds in as many calibrations as was said, and what cannot be is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from isthmus.engine.threshold import NEVER, least
from isthmus.protocol.errors import BundleError, ModelError
from isthmus.split.certificate import (
    MOST_PROMPTS,
    THRESHOLDS,
    Certificate,
    Said,
    calibrate,
    data_hash,
    emitted,
    fewest_prompts,
    losses,
    p_value,
    upper_bound,
)
from isthmus.split.exit_states import Sample

HASH = "ab" * 32
ALLOWED = 0.05
DRAWS, FAILURES = 200, 18  # of 200 at confidence 0.95, 10 are expected; more than 18 come once in 150 times


def population(count: int, seed: int) -> list[Said]:
    """Prompts of different difficulty, on which confidence says more than it should."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length, hard = int(rng.integers(20, 120)), rng.beta(2, 5)
        confidence = rng.beta(2.5, 1.2, length).astype(np.float32)
        found.append(Said(confidence, rng.random(length) < confidence * (1 - 0.5 * hard)))
    return found


@pytest.mark.parametrize(("disagreement", "confidence"), [(0.05, 0.95), (0.01, 0.95), (0.3, 0.6), (0.9, 0.95)])
def test_fewer_prompts_certify_nothing(disagreement: float, confidence: float) -> None:
    least = fewest_prompts(disagreement, confidence)
    right = Said(np.full(9, 0.5, np.float32), np.ones(9, np.bool_))
    found = [
        certified([right] * count, disagreement=disagreement, confidence=confidence) for count in (least - 1, least)
    ]
    assert found[0] is None and found[1] is not None


def test_no_end_of_prompts_is_not_looked_for() -> None:
    assert fewest_prompts(1e-9, 0.95) == MOST_PROMPTS


EVERY = population(2000, 0)
RISKS = {threshold: float(losses(EVERY, threshold).mean()) for threshold in THRESHOLDS}


def drawn(count: int, seed: int) -> list[Said]:
    return [EVERY[i] for i in np.random.default_rng(seed).integers(0, len(EVERY), count)]


def certified(said: list[Said], **options: float) -> Certificate | None:
    settings = {"disagreement": ALLOWED, "confidence": 0.95, **options}
    return calibrate(said, exit=HASH, data=HASH, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [100, 400])
def test_at_most_eighteen_of_two_hundred_calibrations_break_their_promise(count: int) -> None:
    found = [certified(drawn(count, seed)) for seed in range(DRAWS)]
    risks = [0.0 if one is None else RISKS[one.threshold] for one in found]
    assert sum(risk > ALLOWED for risk in risks) <= FAILURES
    assert np.mean(risks) > (0.25 if count == 100 else 0.75) * ALLOWED  # nor is the promise kept by silence
    bounds = [one is not None and RISKS[one.threshold] > one.bound for one in found]
    assert sum(bounds) <= 2 * FAILURES  # the bound at the threshold that was chosen by the same data


def test_the_threshold_that_merely_looks_right_breaks_it_more_often() -> None:
    failures = 0
    for seed in range(DRAWS):
        said = drawn(100, seed)
        looks = [threshold for threshold in THRESHOLDS if losses(said, threshold).mean() <= ALLOWED]
        failures += RISKS[min(looks)] > ALLOWED
    assert failures > 3 * FAILURES


def test_the_p_value_is_valid_at_the_edge_of_the_hypothesis() -> None:
    rng = np.random.default_rng(0)
    for kind in ("all or nothing", "small", "constant"):
        small = 0
        for _ in range(1000):
            draws = {"all or nothing": (rng.random(100) < 0.05) * 1.0, "small": rng.beta(0.5, 9.5, 100)}
            small += p_value(draws.get(kind, np.full(100, 0.05)), 0.05, 0.05) <= 0.05
        assert small <= 70  # 50 expected at most, 7 its standard deviation


def test_the_p_value_sees_small_losses() -> None:
    assert p_value(np.zeros(100), 0.05, 0.05) < 0.02
    assert p_value(np.full(100, 0.01), 0.05, 0.05) < p_value(np.full(100, 0.03), 0.05, 0.05) < 1
    assert p_value(np.full(100, 0.06), 0.05, 0.05) == p_value(np.ones(100), 0.05, 0.05) == 1
    assert 0.02 < upper_bound(np.full(400, 0.02), 0.05) < 0.04
    assert upper_bound(np.ones(50), 0.05) == 1


def test_what_is_certified_says_what_was_measured() -> None:
    said = drawn(400, 1)
    found = certified(said)
    assert found is not None
    assert found.prompts == 400 and found.tokens == sum(len(one.right) for one in said)
    assert found.risk == losses(said, found.threshold).mean() <= found.bound <= ALLOWED
    assert found.emitted == emitted(said, found.threshold) > 0
    found.check("it")
    again = msgspec.json.decode(msgspec.json.encode(found), type=Certificate)
    assert again == found
    stricter = certified(said, disagreement=0.02)
    assert stricter is not None and stricter.threshold > found.threshold and stricter.emitted < found.emitted


def test_nothing_is_certified_without_reason() -> None:
    wrong = [Said(np.full(10, 0.999, np.float32), np.zeros(10, bool))] * 200
    assert certified(wrong) is None
    assert certified(drawn(20, 0)) is None  # too few prompts for any promise of 5 %


def test_an_exit_that_never_emits_is_never_wrong() -> None:
    sure = [Said(np.ones(5, np.float32), np.zeros(5, bool))]
    assert losses(sure, NEVER).tolist() == [0] and emitted(sure, NEVER) == 0
    assert losses(sure, 0.995).tolist() == [1] and emitted(sure, 0.995) == 1
    same = [Said(np.full(5, 0.995, np.float32), np.zeros(5, bool))]
    assert emitted(same, 0.995) == (float(same[0].confidence[0]) >= least(0.995)) == 1


@pytest.mark.parametrize(
    "options", [{"disagreement": 0.0}, {"disagreement": 1.0}, {"confidence": 1.5}, {"confidence": float("nan")}]
)
def test_what_cannot_be_promised_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="is impossible; choose one between 0 and 1"):
        certified(EVERY[:20], **options)


def test_no_answers_are_refused() -> None:
    for said in ([], [Said(np.zeros(0, np.float32), np.zeros(0, bool))]):
        with pytest.raises(ModelError, match="no answers to calibrate on"):
            certified(said)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": 0.0}, "values cannot be"),
        ({"threshold": 1.5}, "values cannot be"),
        ({"threshold": float("nan")}, "values cannot be"),
        ({"data": "x"}, "values cannot be"),
        ({"prompts": 0}, "values cannot be"),
        ({"bound": 0.2}, "a certificate of 0.05 with the risk"),
        ({"risk": 0.049, "bound": 0.04}, "a certificate of 0.05 with the risk"),
    ],
)
def test_a_certificate_that_cannot_be_is_refused(change: dict[str, float], says: str) -> None:
    found = certified(drawn(400, 1))
    assert found is not None
    with pytest.raises(BundleError, match=f"the exit before layer 2 has .*{says}"):
        msgspec.structs.replace(found, **change).check("the exit before layer 2")


def test_data_are_named_by_all_their_tokens() -> None:
    samples = [Sample([1, 2, 3], 2), Sample([4, 5], 1)]
    assert data_hash(samples) == data_hash(list(samples)) != data_hash(samples[:1])
    assert data_hash(samples) != data_hash([Sample([1, 2, 3], 1), Sample([4, 5], 1)])
