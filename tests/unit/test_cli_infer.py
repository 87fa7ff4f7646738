"""What `isthmus run` tells of a network's runs."""

from __future__ import annotations

import pytest

from isthmus.apps.cli.infer import _rate


def test_a_rate_is_of_runs_that_have_warmed_up() -> None:
    assert _rate([0.0, 5.0, 6.0, 7.0, 8.0], 0) == pytest.approx(1.0)
    assert _rate([0.0, 5.0, 6.0], 0) == pytest.approx(1.0)
    assert _rate([0.0, 5.0], 0) == pytest.approx(0.2)  # alone, it is all that is known


def test_a_pipeline_is_full_before_its_rate_is_taken() -> None:
    bursts = [0.0, 4.0, 4.1, 4.2, 4.3, 8.0, 8.1, 8.2, 8.3]  # four at a time
    assert _rate(bursts, 4) == pytest.approx(1.0)
    assert _rate(bursts[:5], 4) == pytest.approx(4 / 4.3)
