"""A conversation survives whatever happens: a short run of what `benchmarks/survival.py` does at length."""

from __future__ import annotations

from hypothesis import settings

from tests.edge_survival import Survival
from tests.edge_toys import toy_engine  # noqa: F401

TestSurvival = Survival.TestCase
TestSurvival.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
