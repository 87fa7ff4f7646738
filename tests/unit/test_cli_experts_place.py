"""`isthmus experts place`: from recorded routing to a file that `isthmus run` takes, and what can be asked wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.apps.cli.main import main as run
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.placement import Placement
from isthmus.engine.routing import Routing, RoutingFile
from isthmus.split.bundle import Bundle
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config
from tests.stored_experts import record_bytes, stored

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return stored(RandomModel("n8", random_config(experts=ExpertsConfig(8, 2, 40))), tmp_path_factory.mktemp("b"))


def routing_of(bundle: Bundle, path: Path, **other: Any) -> Path:
    """Experts 0 and 1 for most tokens, any others for the rest; the held-out half never takes 0."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((60, 3, 8)), axis=2)[..., :2].astype(np.int32)
    chosen[:20] = (0, 1)
    chosen[30:] = 1 + chosen[30:] % 7
    made = Routing(chosen, np.ones(chosen.shape, np.float32), chosen)
    RoutingFile(**{"routing": made, "model": bundle.model_id, "n_experts": 8, **other}).save(path)
    return path


def ask(bundle: Bundle, tmp_path: Path, *more: str) -> int:
    return run(["experts", "place", str(bundle.path), "--routing", str(routing_of(bundle, tmp_path / "r.npz")), *more])


def test_a_placement_goes_to_a_file_and_to_people(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = 6.5 * record_bytes(bundle) / 1e6
    assert ask(bundle, tmp_path, "--expert-mb", str(room), "-o", str(tmp_path / "p.json")) == 0
    shown = capsys.readouterr().out
    for words in ("contiguous", "random", "frequency", "no placement is better", "LFRU", "Belady", "as placed"):
        assert words in shown, words
    found = Placement.load(tmp_path / "p.json")
    assert found.model == bundle.model_id and found.places == ("memory", "flash")
    assert [sorted(row.tolist()) for row in found.memory] == [[0, 1]] * 3
    told = found.figures
    assert told["proven"] and told["positions"] == told["held_out_positions"] == 30
    assert told["ways"][0]["held_out_cost"] > told["cost"]
    assert ask(bundle, tmp_path, "--expert-mb", str(room), "--json") == 0
    assert json.loads(capsys.readouterr().out)["stands"] == [list(row) for row in found.stands]


def test_workers_and_a_cloud(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(bundle, tmp_path, "--workers", "2", "--balance", "9", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "workers" and all(sorted(row) == [0] * 4 + [1] * 4 for row in told["stands"])
    assert told["figures"]["cost"] <= told["figures"]["ways"][1]["cost"]
    link = "rtt=1,up=1000,down=1000"
    slow = ("--expert-mb", "0", "--flash-mb-s", "0.01", "--link", link, "--json")
    assert ask(bundle, tmp_path, *slow) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["places"] == ["memory", "flash", "cloud"] and used_stand_in(told) == {2}
    assert told["figures"]["cost"] == pytest.approx(3 * 1e-3, rel=0.1)  # a round trip a layer


class _Words:
    """A tokenizer for texts of numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def test_routing_is_recorded_along_texts_and_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bundle, "tokenizer", lambda self: _Words())
    texts = [some_tokens(30, seed) for seed in (1, 2)]
    for name, tokens in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, tokens)))
    asked = ["experts", "place", str(bundle.path), "--text", str(tmp_path), "--workers", "2"]
    assert run([*asked, "--tokens", "50", "--save-routing", str(tmp_path / "r.npz"), "--json"]) == 0
    shown = capsys.readouterr().out
    found = RoutingFile.load(tmp_path / "r.npz")
    assert found.model == bundle.model_id and found.routing.chosen.shape == (50, 3, 2)
    part = open_part(bundle)
    routing = part.record(20)
    run_tokens(part, part.open(), texts[1][:20], [20])  # each text begins anew
    part.close()
    assert routing is not None and (found.routing.chosen[30:] == routing.chosen).all()
    assert (
        run(["experts", "place", str(bundle.path), "--routing", str(tmp_path / "r.npz"), "--workers", "2", "--json"])
        == 0
    )
    again = capsys.readouterr().out
    assert json.loads(again)["stands"] == json.loads(shown)["stands"]
    assert run([*asked, "--save-routing", str(tmp_path / "r.txt")]) == 2
    assert "name a .npz file" in capsys.readouterr().err


def used_stand_in(told: dict[str, Any]) -> set[int]:
    """Places of the experts that the text took; where the others stand costs nothing."""
    rows = zip(told["stands"], told["uses"], strict=True)
    return {place for row, uses in rows for place, use in zip(row, uses, strict=True) if use}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ((), "for whom to place"),
        (("--workers", "2", "--expert-mb", "1"), "two questions"),
        (("--workers", "9"), "9 workers for 8 experts"),
        (("--workers", "2", "--link", "rtt=1,up=1,down=1"), "--link has no effect with --workers"),
        (("--expert-mb", "1", "--balance", "0.2"), "--balance has no effect without --workers"),
        (("--expert-mb", "-1"), "--expert-mb is -1"),
        (("--expert-mb", "0", "--flash-mb", "0.001"), "MB more, or another place"),
        (("--expert-mb", "1", "--expert-bits", "3"), "--expert-bits is 3"),
        (("--expert-mb", "1", "--flash-mb-s", "0"), "flash reads 0 MB/s"),
        (("--expert-mb", "1", "--link", "fast"), "rtt=20,up=5,down=20"),
        (("--expert-mb", "1", "--text", "some.txt"), "either --routing or --text"),
        (("--expert-mb", "1", "--tokens", "9"), "--tokens has no effect with --routing"),
        (("--expert-mb", "1", "-o", "no/such/p.json"), "there is no folder"),
    ],
)
def test_what_is_asked_wrongly(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], why: str
) -> None:
    assert ask(bundle, tmp_path, *more) == 2
    shown = capsys.readouterr()
    assert why in shown.err and not shown.out


def test_routing_of_another_model_and_damaged(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = Routing(*(np.zeros((10, 4, 2), kind) for kind in (np.int32, np.float32, np.int32)))  # type: ignore[arg-type]
    for other, why in (
        ({"routing": wide}, "4 layers with 2 of 8 experts"),
        ({"n_experts": 16}, "3 layers with 2 of 16 experts"),
        ({"model": "0" * 32}, "recorded with the model 000"),
    ):
        path = routing_of(bundle, tmp_path / "r.npz", **other)
        assert run(["experts", "place", str(bundle.path), "--routing", str(path), "--expert-mb", "1"]) == 2
        assert why in capsys.readouterr().err
    path.write_bytes(b"nothing of the kind")
    assert run(["experts", "place", str(bundle.path), "--routing", str(path), "--expert-mb", "1"]) == 2
    assert "is no recorded routing, or is damaged" in capsys.readouterr().err


def test_a_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = stored(RandomModel("q8", random_config()), tmp_path / "dense")
    assert run(["experts", "place", str(dense.path), "--text", "none.txt", "--workers", "2"]) == 2
    assert "has no experts to place" in capsys.readouterr().err


def test_run_refuses_a_placement_without_a_budget(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", str(bundle.path), "--prompt", "x", "--placement", str(tmp_path / "p.json")]
    assert run(given) == 2
    assert "--placement has no effect without --expert-mb" in capsys.readouterr().err
    (tmp_path / "p.json").write_text("{}")
    assert run([*given, "--expert-mb", "1"]) == 2
    assert "p.json is no placement" in capsys.readouterr().err
