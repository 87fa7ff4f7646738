"""Files of recorded routing: what was written is read, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.engine.routing import FORMAT, Routing, RoutingFile
from isthmus.protocol.errors import EngineError


def some() -> Routing:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 8, (20, 3, 2)).astype(np.int32)
    return Routing(chosen, rng.random(chosen.shape).astype(np.float32), chosen[::-1].copy())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    RoutingFile(some(), "abc", 8).save(tmp_path / "r.npz")
    found = RoutingFile.load(tmp_path / "r.npz")
    assert (found.model, found.n_experts) == ("abc", 8)
    for name in ("chosen", "weights", "foreseen"):
        assert (getattr(found.routing, name) == getattr(some(), name)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def written(path: Path, **other: Any) -> Path:
    """A file with something else in it than there should be."""
    one = some()
    fields: dict[str, Any] = {"chosen": one.chosen, "weights": one.weights, "foreseen": one.foreseen}
    fields |= {"model": np.array("abc"), "n_experts": np.array(8), "text": np.array("a letter")}
    fields |= {"format": np.array(FORMAT)} | other
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"format": np.array("isthmus-routing-9")}, "isthmus-routing-9"),
        ({"weights": None}, "weights"),
        ({"chosen": some().chosen.astype(np.int64)}, "int64"),
        ({"chosen": some().chosen + 1}, "none of 8"),
        ({"foreseen": some().foreseen - 1}, "none of 8"),
        ({"chosen": some().chosen[:5]}, "different shapes"),
        ({"weights": np.full_like(some().weights, np.nan)}, "not finite"),
        ({"n_experts": np.array("many")}, "damaged"),
        ({"model": np.array([{"a": 1}], dtype=object)}, "damaged"),  # what only a pickle can hold
        ({name: getattr(some(), name)[:0] for name in ("chosen", "weights", "foreseen")}, "no positions"),
    ],
)
def test_what_is_no_routing_is_refused(tmp_path: Path, other: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineError, match=why) as raised:
        RoutingFile.load(written(tmp_path / "r.npz", **other))
    assert "record it again" in raised.value.remedy


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    RoutingFile(some(), "abc", 8).save(path)
    whole = path.read_bytes()
    for data in (
        b"",
        b"PK",
        whole[: len(whole) // 2],
        whole[:60] + bytes(len(whole) // 4) + whole[60 + len(whole) // 4 :],
    ):
        path.write_bytes(data)
        with pytest.raises(EngineError, match="no recorded routing, or is damaged"):
            RoutingFile.load(path)
    with pytest.raises(EngineError, match="there is no file"):
        RoutingFile.load(tmp_path / "none.npz")
    with pytest.raises(EngineError, match="damaged"):
        RoutingFile.load(tmp_path)
