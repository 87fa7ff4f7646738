"""What benchmarks keep of a run that is stopped."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finding:
    number: int
    text: str


@pytest.mark.parametrize("torn", ['{"number": 2, "te', '{"number": 2, "text": "b"}'])
def test_a_torn_line_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from kept import Kept

    path = tmp_path / "new" / "kept.jsonl"
    kept = Kept(path, Finding)
    kept.add([Finding(1, "a")])
    with path.open("a") as file:
        file.write(torn)
    again = Kept(path, Finding)
    whole = [Finding(1, "a"), *[Finding(2, "b")] * torn.endswith("}")]
    assert again.found == whole
    again.add(iter([Finding(3, "c")]))
    again.add([Finding(4, "d")])
    assert Kept(path, Finding).found == [*whole, Finding(3, "c"), Finding(4, "d")] == again.found
