"""What "auto" means."""

from __future__ import annotations

import pytest

from isthmus.edge.policy import Situation, choose
from isthmus.protocol.errors import DeviceError


@pytest.mark.parametrize(
    ("has_cloud", "link_up", "whole_model", "mode"),
    [
        (True, True, True, "stream"),
        (True, True, False, "stream"),
        (True, False, True, "local"),
        (False, False, True, "local"),
    ],
)
def test_the_cloud_while_it_answers_else_this_device(
    has_cloud: bool, link_up: bool, whole_model: bool, mode: str
) -> None:
    assert choose(Situation(has_cloud, link_up, whole_model)) == mode


@pytest.mark.parametrize(("has_cloud", "problem"), [(True, "does not answer"), (False, "does not hold")])
def test_nobody_can_answer(has_cloud: bool, problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        choose(Situation(has_cloud, False, False))
