"""Which of a cloud's models a device means, and what it is told when that is not clear."""

from __future__ import annotations

import pytest

from isthmus.edge.offers import choose
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import Offer


def offer(model_id: str, name: str, weights: str) -> Offer:
    return Offer(model_id, name, 4, 8, 100, "toy", True, ("f16",), ("f32",), 512, weights)


ONE, TWO, OTHER = offer("aa11" * 8, "smol", "q4"), offer("aa22" * 8, "smol", "q8"), offer("bb33" * 8, "tiny", "")


def test_an_id_begun_or_a_name_of_its_own_is_enough() -> None:
    offers = (ONE, TWO, OTHER)
    assert choose(offers, "aa2") == choose(offers, "AA22" * 8) == TWO
    assert choose(offers, "tiny") == OTHER
    assert choose((OTHER,), "") == OTHER


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("", r"serves 3 models: smol \(q4, aa11aa11aa11\), smol \(q8, aa22aa22aa22\), tiny \(bb33bb33bb33\)"),
        ("smol", r"2 models of the cloud fit 'smol': smol \(q4, aa11aa11aa11\), smol \(q8, aa22aa22aa22\); choose"),
        ("huge", "serves no language model 'huge': smol"),
    ],
)
def test_what_is_not_clear_is_listed(wanted: str, problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        choose((ONE, TWO, OTHER), wanted)
