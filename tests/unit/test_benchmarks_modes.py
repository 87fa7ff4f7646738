"""How exit mode is held against its peer in the benchmark of modes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.bench.modes import CE_COLLM, EXIT, Row

ROOT = Path(__file__).resolve().parents[2]


def test_like_is_held_against_like_to_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from modes import AGAINST, ANEW, against
    from record import Record

    costs: dict[str, Any] = {"requests_per_token": 0.5, "cloud_ms_per_token": 1.0, "tok_s": 30.0}
    rows = {
        CE_COLLM: Row(CE_COLLM, requests_per_token=1.0, cloud_ms_per_token=2.0, up_bytes_per_token=1800.0, tok_s=20.0),
        EXIT: Row(EXIT, up_bytes_per_token=500.0, **costs),
        ANEW: Row(ANEW, up_bytes_per_token=660.0, **costs),
    }
    for row, agreement in zip(rows.values(), (0.95, 0.96, 0.94), strict=True):
        row.agreement = agreement
    record = Record("modes")
    for key, unit, *_ in AGAINST:
        record.figure(f"modes/{CE_COLLM}/{key}", getattr(rows[CE_COLLM], key), unit)
    against(record, rows)
    held, anew = "against CE-CoLLM", "against CE-CoLLM, every prompt anew"
    for key in [*(key for key, *_ in AGAINST), "agreement above theirs"]:
        ours, alike = record.figures[f"{held}/{key}"], record.figures[f"{anew}/{key}"]
        assert {ours[name] == alike[name] for name in ("target", "sense", "unit")} == {True}
    missed = [name for name, figure in record.figures.items() if figure.get("met") is False]
    assert missed == [f"{anew}/up_bytes_per_token", f"{anew}/agreement above theirs"]
