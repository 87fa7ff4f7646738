"""What people see of experts in a budget: lines, pictures, and what is said before a run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.apps.bench.expert_text import recorded
from isthmus.apps.bench.experts import Setup, budgets
from isthmus.apps.cli.bench_experts import megabytes
from isthmus.apps.cli.expert_picture import ABSENT, HELD, HIT, MISS, draw, states
from isthmus.apps.cli.expert_view import View, lines, look, timeline
from isthmus.apps.cli.foretold import foretold
from isthmus.apps.cli.main import main
from isthmus.apps.cli.run import _foretell
from isthmus.edge.experts.facts import Facts, read_routing, routing_file, write_facts, write_routing
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import BundleError, DeviceError, ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import expert_file
from tests.edge_bundle import CONFIG, write_tiny
from tests.native_tools import open_part
from tests.stored_experts import record_bytes

native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
FACTS = Facts(900.0, 0.05, 6.0, 0.1, 0.02, True)
LAYERS, EXPERTS, TOP = CONFIG.n_layers, 8, 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture's bundle, and an empty cache."""
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: tmp_path / "kept")
    monkeypatch.setattr("isthmus.apps.bench.expert_text.find", lambda _: None)
    return write_tiny(tmp_path / "tiny", experts=ExpertsConfig(EXPERTS, TOP, CONFIG.d_ff))


def routing(positions: int = 60) -> Routing:
    rng = np.random.default_rng(1)
    some = [[rng.choice(EXPERTS, TOP, replace=False) for _ in range(LAYERS)] for _ in range(positions)]
    chosen = np.array(some, np.int32)
    return Routing(chosen, np.ones(chosen.shape, np.float32), chosen)


def known(folder: Path) -> Bundle:
    bundle = Bundle.open(folder)
    write_routing(bundle, routing(), "a letter")
    write_facts(bundle, 0, 0, FACTS)
    return bundle


def test_a_view_has_a_line_for_each_layer(folder: Path) -> None:
    bundle = Bundle.open(folder)
    write_routing(bundle, routing(), "a letter")
    view = look(bundle, None, 0)
    told = lines(view, folder)
    assert told[0].startswith("tiny: 0.6 MB hold 25.0% of the experts; ") and told[0].endswith("60 tokens of a letter")
    assert [line.split()[0] for line in told[4 : 4 + LAYERS]] == [str(layer) for layer in range(LAYERS)]
    assert told[-1] == f"nothing was measured on this machine yet: isthmus bench experts {folder} tells the speed"
    held = [int(line.split()[3]) for line in told[4 : 4 + LAYERS]]
    assert held == view.cache.resident[-1].sum(axis=1).tolist()
    write_facts(bundle, 0, 0, FACTS)
    spoken = "\n".join(lines(look(bundle, None, 0), folder)[-3:])
    assert "MB a token" in spoken and "at 900 MB/s" in spoken and "tokens/s" in spoken


def test_json_says_what_the_lines_say(folder: Path) -> None:
    view = look(known(folder), 1.2, 0)
    told = view.to_dict()
    assert told["expert_mb"] == 1.2 and [one["layer"] for one in told["hits_by_layer"]] == list(range(LAYERS))
    assert told["hits"]["belady"] >= told["hits"]["lru"]
    assert told["forecast"]["tokens_s"] > 0 and told["facts"]["flash_mb_s"] == 900.0


def test_all_in_memory_is_all_hits(folder: Path) -> None:
    view = look(known(folder), 100.0, 0)
    assert view.share == 1.0 and view.policies["lru"] > 0.9
    assert view.forecast is not None and view.forecast.tokens_s == pytest.approx(1e3 / 6.0, rel=0.05)


@native
def test_routing_is_recorded_when_there_is_none_and_when_it_is_damaged(folder: Path) -> None:
    bundle = Bundle.open(folder)
    view = look(bundle, None, 0)
    assert view.text == "the model's own answer" and len(view.routing.chosen) > 100
    again = look(bundle, None, 0)
    assert (again.routing.chosen == view.routing.chosen).all()
    path = routing_file(bundle)
    assert path is not None
    path.write_bytes(path.read_bytes()[:500])
    assert read_routing(bundle) is None
    assert (look(bundle, None, 0).routing.chosen == view.routing.chosen).all()
    assert read_routing(bundle) is not None


def test_shades_follow_rates() -> None:
    assert timeline([0.0, 0.1, 0.5, 1.0], 4) == " ░▓█"
    assert timeline([1.0] * 10 + [0.0] * 10, 2) == "█ "
    assert len(timeline([0.5] * 7, 48)) == 7


def test_the_picture_shows_every_state(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    view = look(known(folder), 1.2, 0)
    cells = states(view)
    assert cells.shape == (LAYERS * EXPERTS, 60) and set(np.unique(cells)) == {ABSENT, HELD, HIT, MISS}
    assert ((cells == HIT) | (cells == MISS)).sum() == view.routing.chosen.size
    assert (cells == HIT).sum() == view.cache.hits.sum()
    draw(tmp_path / "one.png", view)
    draw(tmp_path / "two.png", view)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_foretold_in_one_line(folder: Path) -> None:
    known(folder)
    some, all_of_them = (foretold(folder, ExpertSettings(mb), 0) for mb in (1.2, 100.0))
    assert " tokens/s are foretold with 1.2 MB, " in some
    assert float(all_of_them.split()[1]) > float(some.split()[1])


def test_what_was_not_measured_names_the_command(folder: Path) -> None:
    assert f"isthmus bench experts {folder} --expert-bits 4 --threads 3 measures" in foretold(
        folder, ExpertSettings(1.0, bits=4), 3
    )


def test_what_a_device_says_itself_is_not_said_before(folder: Path, tmp_path: Path) -> None:
    """Too small a budget, a bundle that is not there, dense, or held in part."""
    known(folder)
    assert foretold(folder, ExpertSettings(0.01), 0) == ""
    assert foretold(tmp_path / "none", ExpertSettings(1.0), 0) == ""
    assert foretold(write_tiny(tmp_path / "dense"), ExpertSettings(1.0), 0) == ""
    (folder / expert_file(2)).unlink()
    assert foretold(folder, ExpertSettings(1.2), 0) == ""


def test_only_a_terminal_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _foretell(folder, ExpertSettings(1.2), 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _foretell(folder, ExpertSettings(1.2), 0)
    assert "isthmus bench experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "DENSE", "--experts"], "tiny has no experts; name a mixture of experts"),
        (["bench", "experts", "DENSE"], "tiny has no experts; name a mixture of experts"),
        (["inspect", "MIXTURE", "--experts", "--expert-mb", "0.1"], "0.1 MB does not hold the experts that one layer"),
        (["bench", "experts", "MIXTURE", "--expert-mb", "2,0.1"], "does not hold the experts that one layer needs"),
        (["bench", "experts", "MIXTURE", "--expert-mb", "2,x"], "--expert-mb is '2,x'; give numbers of megabytes"),
        (["bench", "experts", "MIXTURE", "--expert-bits", "3"], "--expert-bits is 3; choose 2, 4 or 8"),
        (["bench", "experts", "MIXTURE", "--flash-mb-s", "-1"], "--flash-mb-s is -1.0; give a number"),
        (["bench", "experts", "MIXTURE", "--tokens", "3"], "--tokens is 3; measure 40 to 512"),
        (["inspect", "MIXTURE", "--expert-mb", "2"], "--expert-mb has no effect without --experts"),
        (["inspect", "MIXTURE", "--plot", "x.png"], "--plot has no effect without --experts"),
        (["inspect", "MIXTURE", "--experts", "--verify"], "--verify has no effect with --experts"),
        (["inspect", "MIXTURE", "--experts", "--plot", "x.gif"], "--plot is 'x.gif'; name a file that ends in .png"),
    ],
)
def test_mistakes_are_said_in_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "x.gif" in arguments:
        pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    dense = write_tiny(tmp_path / "dense")
    named = {"DENSE": str(dense), "MIXTURE": str(folder)}
    assert main([named.get(word, word) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert said in " ".join(told.split()) and told.count("\n") == 1


def test_a_bundle_that_is_partly_here_is_refused(folder: Path) -> None:
    known(folder)
    (folder / expert_file(2)).unlink()
    with pytest.raises(BundleError, match=r"holds layers \[0, 2\) of 4; all are needed"):
        look(Bundle.open(folder), None, 0)
    with pytest.raises(BundleError, match=r"holds layers \[0, 2\) of 4"):
        budgets(Bundle.open(folder), [], 0, 0.0)


def test_budgets_are_in_order_and_hold_a_layer(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert [one.mb for one in budgets(bundle, [3.0, 1.0, 3.0], 0, 0.0)] == [1.0, 3.0]
    by_default = budgets(bundle, [], 0, 0.0)
    assert len({one.mb for one in by_default}) == len(by_default) and by_default[0].budget >= (TOP + 1) * record_bytes(
        bundle
    )
    assert megabytes("") == [] and megabytes("1.5, 2") == [1.5, 2.0]
    with pytest.raises(DeviceError, match="--tokens is 513"):
        Setup(bundle, by_default, tokens=513)


@native
def test_routing_along_a_text_is_that_of_its_documents(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(folder)
    part = open_part(bundle)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the first of two letters"}\n{"text": "and the second one of them"}\n')
    found, called = recorded(bundle, part, 40, text)
    assert called == "text.jsonl" and found.chosen.shape == (40, LAYERS, TOP)
    alone = tmp_path / "alone.txt"
    alone.write_text("and the second one of them, which goes on for longer")
    second, _ = recorded(bundle, part, 40, alone)
    assert (second.chosen[:16] == found.chosen[24:]).all()
    for content, problem in (("short", "has 5 tokens"), ("  ", "holds no text")):
        text.with_suffix(".txt").write_text(content)
        with pytest.raises(ModelError, match=problem):
            recorded(bundle, part, 40, text.with_suffix(".txt"))
    with pytest.raises(ModelError, match="cannot be read as text: No such file"):
        recorded(bundle, part, 40, tmp_path / "none.txt")
    part.close()


def test_a_view_says_of_which_layers(folder: Path) -> None:
    view: View = look(known(folder), 1.2, 0)
    assert view.layers == tuple(range(LAYERS)) and view.warm == 15
