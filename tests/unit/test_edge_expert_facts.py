"""What is kept of a mixture on this machine: it comes back as it was, and counts as none when it is damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.experts.facts import (
    Facts,
    facts_file,
    of_expert_layers,
    read_facts,
    read_routing,
    routing_file,
    steps_of,
    write_facts,
    write_routing,
)
from isthmus.edge.experts.foretold import foretell
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import BundleError, DeviceError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import expert_file
from tests.edge_bundle import write_tiny
from tests.random_model import RandomModel, random_config
from tests.stored_experts import record_bytes, stored

FACTS = Facts(900.0, 0.05, 6.0, 0.1, 0.02, True)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: tmp_path / "kept")
    return stored(RandomModel("n8", random_config(experts=ExpertsConfig(8, 2, 40))), tmp_path / "bundle")


def routing(positions: int = 50) -> Routing:
    rng = np.random.default_rng(1)
    chosen = np.array([[rng.choice(8, 2, replace=False) for _ in range(3)] for _ in range(positions)], np.int32)
    return Routing(chosen, rng.random(chosen.shape).astype(np.float32), chosen)


def kept(path: Path | None) -> Path:
    assert path is not None
    return path


def test_facts_come_back_for_their_threads_and_bits_only(bundle: Bundle) -> None:
    assert read_facts(bundle, 0, 1) is None
    write_facts(bundle, 0, 1, FACTS)
    assert read_facts(bundle, 0, 1) == FACTS == read_facts(bundle, 3, 1)  # all planes are three
    assert read_facts(bundle, 1, 1) is None and read_facts(bundle, 0, 7) is None


def test_an_emulated_flash_has_facts_of_its_own(bundle: Bundle) -> None:
    slower = Facts(900.0, 0.05, 6.0, 0.4, 0.02, True)
    write_facts(bundle, 0, 1, slower, 200.0)
    assert read_facts(bundle, 0, 1) is None and read_facts(bundle, 0, 1, 200.0) == slower
    write_facts(bundle, 0, 1, FACTS)
    assert read_facts(bundle, 0, 1) == FACTS == read_facts(bundle, 0, 1, 50.0)
    assert read_facts(bundle, 0, 1, 200.0) == slower


def test_routing_comes_back(bundle: Bundle) -> None:
    assert read_routing(bundle) is None
    write_routing(bundle, routing(), "a letter")
    found = read_routing(bundle)
    assert found is not None and found[1] == "a letter"
    assert (found[0].chosen == routing().chosen).all() and (found[0].foreseen == routing().foreseen).all()
    assert found[0].weights == pytest.approx(routing().weights, abs=1e-3)


def test_nothing_is_kept_without_a_folder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: None)
    write_facts(bundle, 0, 1, FACTS)
    write_routing(bundle, routing(), "")
    assert read_facts(bundle, 0, 1) is None and read_routing(bundle) is None


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"model_id": "0" * 64}, {"flash_mb_s": 0}, {"token_ms": float("nan")}, {"wait_ms": "x"}],
)
def test_facts_that_cannot_be_are_none(bundle: Bundle, change: dict[str, Any]) -> None:
    write_facts(bundle, 0, 1, FACTS)
    path = kept(facts_file(bundle, 0, 1))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_facts(bundle, 0, 1) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b"\xff\x00", b"[1, 2]"])
def test_damaged_files_are_none(bundle: Bundle, damage: bytes) -> None:
    write_facts(bundle, 0, 1, FACTS)
    write_routing(bundle, routing(), "")
    kept(facts_file(bundle, 0, 1)).write_bytes(damage)
    kept(routing_file(bundle)).write_bytes(damage)
    assert read_facts(bundle, 0, 1) is None and read_routing(bundle) is None
    assert foretell(bundle, ExpertSettings(1.0), 1) is None


def test_routing_that_lost_a_bit_is_none(bundle: Bundle) -> None:
    write_routing(bundle, routing(), "")
    path = kept(routing_file(bundle))
    whole = path.read_bytes()
    at = whole.index(b"chosen.npy") + 300
    for altered in (whole[:-100], whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        path.write_bytes(altered)
        assert read_routing(bundle) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chosen", np.full((5, 3, 2), 8, np.int32)),  # no such expert
        ("chosen", np.zeros((5, 4, 2), np.int32)),  # nor layer
        ("foreseen", np.zeros((4, 3, 2), np.int32)),
        ("weights", np.full((5, 3, 2), np.inf, np.float32)),
        ("weights", np.zeros((5, 3, 2), np.float64)),
        ("model", np.array("another")),
        ("n_experts", np.array(9)),
        ("format", np.array("isthmus-routing-9")),
    ],
)
def test_routing_of_something_else_is_none(bundle: Bundle, name: str, value: Any) -> None:
    write_routing(bundle, routing(5), "")
    path = kept(routing_file(bundle))
    with np.load(path) as file:
        arrays = dict(file)
    assert read_routing(bundle) is not None
    made = io.BytesIO()
    np.savez(made, **(arrays | {name: value}))
    path.write_bytes(made.getvalue())
    assert read_routing(bundle) is None


def test_a_budget_is_foretold_from_what_was_kept(bundle: Bundle) -> None:
    size = record_bytes(bundle)
    small, large = ExpertSettings(4 * size / 1e6), ExpertSettings(24 * size / 1e6)
    write_facts(bundle, 0, 1, FACTS)
    assert foretell(bundle, small, 1) is None  # no routing
    write_routing(bundle, routing(), "")
    slow, fast = foretell(bundle, small, 1), foretell(bundle, large, 1)
    assert slow is not None and fast is not None
    assert slow.tokens_s < fast.tokens_s == pytest.approx(1e3 / FACTS.token_ms, rel=0.01)
    slower = foretell(bundle, ExpertSettings(small.mb, flash_mb_s=1.0), 1)
    assert slower is not None and slower.tokens_s < slow.tokens_s
    with pytest.raises(DeviceError, match="a capacity of 1 experts"):
        foretell(bundle, ExpertSettings(1.5 * size / 1e6), 1)


def test_a_bundle_that_is_not_whole_is_said(bundle: Bundle) -> None:
    write_facts(bundle, 0, 1, FACTS)
    write_routing(bundle, routing(), "")
    (bundle.path / expert_file(1)).unlink()
    with pytest.raises(BundleError, match=r"holds layers \[0, 1\) of 3"):
        foretell(bundle, ExpertSettings(1.0), 1)


def test_time_goes_where_the_weights_are(bundle: Bundle, tmp_path: Path) -> None:
    steps = steps_of(bundle, 0, FACTS)
    assert steps.token_ms(2) == pytest.approx(FACTS.token_ms)
    assert steps.small and steps.follows == (False, True, True) and set(steps.sizes) == {record_bytes(bundle)}
    narrow = steps_of(bundle, 1, FACTS)
    assert narrow.token_ms(2) == pytest.approx(FACTS.token_ms) and narrow.sizes[0] < steps.sizes[0]
    assert narrow.expert_ms[0] < steps.expert_ms[0]


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    config = random_config(experts=ExpertsConfig(8, 2, 40, dense_layers=(1,)))
    assert of_expert_layers(routing(), config).chosen.tolist() == routing().chosen[:, [0, 2]].tolist()
    steps = steps_of(stored(RandomModel("q4", config), tmp_path / "some"), 0, FACTS)
    assert len(steps.before_ms) == len(steps.sizes) == 2 and steps.follows == (False, False)
    assert steps.before_ms[1] > steps.before_ms[0]  # the dense layer goes before
    assert foretell(Bundle.open(write_tiny(tmp_path / "tiny")), ExpertSettings(1.0), 1) is None
