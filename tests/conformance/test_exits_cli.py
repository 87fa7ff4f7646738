"""`isthmus exits`: from texts to certified exits in a bundle, on a small random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training exits needs torch==2.13.0")

from isthmus.apps.cli.main import main  # noqa: E402
from isthmus.engine import KvConfig, open_part  # noqa: E402
from isthmus.engine.part import Rows, Want  # noqa: E402
from isthmus.split.bundle import Bundle  # noqa: E402
from isthmus.split.exit_states import States  # noqa: E402
from isthmus.split.exit_writer import put_certificates, put_exits  # noqa: E402
from isthmus.split.shipped import shipped  # noqa: E402
from tests.edge_bundle import an_exit, write_tiny  # noqa: E402

Capture = pytest.CaptureFixture[str]
LOOSE = ["--disagreement", "0.9"]  # of a random model nothing stricter holds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a bundle with trained exits `b`, an untrained one `plain`, texts and a work folder."""
    folder = tmp_path_factory.mktemp("exits")
    write_tiny(folder / "plain")
    shutil.copytree(folder / "plain", folder / "b")
    rng = np.random.default_rng(0)
    words = ["sea", "tea", "rain", "moon", "chess", "bread"]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 12))}) for _ in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("What is rain?\n\nWhy the moon?\nTell me of tea.\n")
    assert main([*train(folder), "--layers", "1,2"]) == 0
    return folder


def train(folder: Path, bundle: str = "b") -> list[str]:
    settings = ["--answers", "6", "--checks", "8", "--epochs", "1", "--d-ff", "32", "--threads", "1"]
    texts = ["--text", str(folder / "texts.jsonl"), "--work", str(folder / "work")]
    return ["exits", "train", str(folder / bundle), *texts, *settings, "--head-tokens", "40"]


def asked(folder: Path, command: str, *options: str, bundle: str = "b") -> list[str]:
    return ["exits", command, str(folder / bundle), "--count", "12", "--work", str(folder / "work"), *options]


def test_training_writes_exits_that_the_bundle_gives(folder: Path) -> None:
    bundle, plain = Bundle.open(folder / "b"), Bundle.open(folder / "plain")
    assert bundle.model_id == plain.model_id and [entry.layer for entry in bundle.exits] == [1, 2]
    entry, exit = bundle.manifest.exit(2), bundle.exit(2)
    assert 0 < entry.head_tokens <= 40 and entry.d_ff == 32 and entry.certificate is None
    assert 0 <= entry.agreement.documents <= 1 and 0 < entry.agreement.answers <= 1
    tokens = exit.head_tokens()
    assert tokens is not None and len(tokens) == entry.head_tokens == exit.head().rows
    part = open_part(plain, 0, 4, threads=1, kv=KvConfig("f16", 256))
    sequence = part.open()
    text = plain.tokenizer().encode("sea tea rain moon chess bread")
    rows = Rows().tokens(sequence, 0, text, leave=2, want=Want.HIDDEN, want_all=True)
    states = part.step(rows).hidden[1:]
    part.close()
    # The exit's channels are those of these states: they stand where its mean and spread say.
    far = np.abs(states.mean(axis=0) - exit.channel_mean) / exit.channel_spread
    assert (exit.channel_spread > 0).all() and np.median(far) < 1


def test_what_was_done_is_not_done_again(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("*") if path.is_file()}
    monkeypatch.setattr("isthmus.split.exit_training._loss", None)
    monkeypatch.setattr("isthmus.split.exit_samples.answers", None)
    shutil.copytree(folder / "plain", folder / "again")
    assert main([*train(folder, "again"), "--layers", "1,2"]) == 0
    shown = capsys.readouterr()
    assert "layer 2 " in shown.out and "MB/emitted" in shown.out and shown.err == ""
    assert {p: p.stat().st_mtime_ns for p in before if "npy" not in p.name} == {
        p: t for p, t in before.items() if "npy" not in p.name
    }
    first, again = Bundle.open(folder / "b"), Bundle.open(folder / "again")
    assert first.read("exits/layer-001.safetensors") == again.read("exits/layer-001.safetensors")


def test_calibrate_measure_inspect_export(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([*train(folder), "--layers", "1,2"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder / "b")]) == 0
    assert "no certificate: it drafts, but never emits" in capsys.readouterr().out
    assert main(asked(folder, "measure")) == 0
    assert "never" in capsys.readouterr().out
    assert main(asked(folder, "calibrate", *LOOSE)) == 0
    shown = capsys.readouterr().out
    assert "exit before layer 1: emits" in shown and "with confidence 95%" in shown and "12 prompts" in shown
    entry = Bundle.open(folder / "b").manifest.exit(1)
    assert entry.certificate is not None and entry.certificate.prompts == 12 and entry.certificate.emitted > 0
    assert entry.codec is not None and entry.codec.agreement >= entry.codec.exact - 0.01
    travels = f"hidden states travel as {entry.codec.name}, {entry.codec.row_bytes:.0f} bytes a token"
    assert travels in shown
    assert main(asked(folder, "measure", "--check")) == 0
    assert "the certificates follow from these prompts" in capsys.readouterr().out
    assert main(["inspect", str(folder / "b"), "--json", "--verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["layer"] for one in facts["exits"]] == [1, 2] and facts["exits"][0]["read_bytes"] > 0
    assert main(["inspect", str(folder / "b")]) == 0
    shown = capsys.readouterr().out
    assert travels in " ".join(shown.split())
    assert "before layer 2, names" in shown and f"data {entry.certificate.data[:12]}" in " ".join(shown.split())
    assert main(["exits", "export", str(folder / "b"), "-o", str(tmp_path / "h" / "tiny"), "--made-by", "x y"]) == 0
    found = shipped(facts["model_id"], tmp_path / "h")
    assert [one for one, _ in found] == list(Bundle.open(folder / "b").exits)
    assert json.loads((tmp_path / "h" / "tiny" / "heads.json").read_text())["commands"] == ["x y"]
    assert main([*train(folder), "--layers", "1,2"]) == 0  # the same exits again: their certificates stay
    assert Bundle.open(folder / "b").manifest.exit(1) == entry


def test_a_codec_may_lose_as_much_as_is_said(folder: Path, capsys: Capture) -> None:
    def chosen(loss: str) -> tuple[str, float]:
        assert main(asked(folder, "calibrate", *LOOSE, "--layers", "1", "--codec-loss", loss)) == 0
        found = Bundle.open(folder / "b").manifest.exit(1).codec
        assert found is not None and found.loss == float(loss)
        return found.name, found.row_bytes

    (coarse, small), (_, large) = chosen("0.99"), chosen("0.0001")
    assert coarse == "ecsq2" and small < large


def test_a_certificate_stays_until_one_is_found_or_it_is_taken_away(folder: Path, capsys: Capture) -> None:
    assert main(asked(folder, "calibrate", *LOOSE)) == 0
    before, strict = Bundle.open(folder / "b").exits, ["--disagreement", "0.001", "--layers", "2"]
    capsys.readouterr()
    assert main(asked(folder, "calibrate", *strict)) == 0
    shown = capsys.readouterr().out
    assert "no threshold keeps 0.1% with confidence 95% on 12 prompts; the certificate of 12 prompts" in shown
    assert "(at most 90.0% allowed) stays; use more prompts, or take it away with --force" in shown
    assert "that takes at least 3" in shown and Bundle.open(folder / "b").exits == before
    assert main(asked(folder, "calibrate", *strict, "--force")) == 0
    assert "on 12 prompts; it drafts, but never emits" in capsys.readouterr().out
    exits = Bundle.open(folder / "b").exits
    assert exits[0].certificate is not None and exits[1].certificate is None


def test_a_certificate_that_its_own_prompts_do_not_give_goes(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(asked(folder, "calibrate", *LOOSE)) == 0
    monkeypatch.setattr("isthmus.split.certificate.calibrate", lambda *_, **__: None)
    assert main(asked(folder, "calibrate", *LOOSE, "--layers", "2")) == 0
    assert "it drafts, but never emits" in capsys.readouterr().out
    assert [one.certificate is None for one in Bundle.open(folder / "b").exits] == [False, True]


def test_an_exit_that_agrees_less_does_not_replace_one(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.split import exit_training

    shutil.copytree(folder / "b", folder / "better")
    assert main(asked(folder, "calibrate", *LOOSE, bundle="better")) == 0
    model_id = Bundle.open(folder / "better").model_id
    put_exits(folder / "better", model_id, [an_exit(model_id, 2)])  # of random weights: worse than any training
    before, whole = Bundle.open(folder / "better").exits, exit_training.train

    def blunt(states: States, indices: list[int], layer: int, *rest: Any) -> exit_training.ExitHead:
        head = whole(states, indices, layer, *rest)
        if layer == 1:
            head.map.weight.zero_()
        return head

    monkeypatch.setattr(exit_training, "train", blunt)
    capsys.readouterr()
    assert main([*train(folder, "better"), "--layers", "1,2"]) == 0
    shown, exits = capsys.readouterr().out, Bundle.open(folder / "better").exits
    assert "the exit before layer 1 that the bundle had stays: it names" in shown and "layer 2 that" not in shown
    assert f"{before[0].agreement.answers:.3f}" in shown  # the table shows what the bundle holds
    assert exits[0] == before[0] and exits[0].certificate is not None
    assert exits[1].agreement == Bundle.open(folder / "b").exits[1].agreement != before[1].agreement
    assert main([*train(folder, "better"), "--layers", "1,2", "--force"]) == 0
    assert "stays" not in capsys.readouterr().out
    assert Bundle.open(folder / "better").exits[0].agreement.answers < before[0].agreement.answers


def test_own_prompts(folder: Path, capsys: Capture) -> None:
    prompts = ["--prompts", str(folder / "prompts.txt")]
    assert main(asked(folder, "calibrate", "--disagreement", "0.99", "--confidence", "0.5", *prompts)) == 0
    assert "3 prompts" in capsys.readouterr().out
    assert main(asked(folder, "measure", "--check", *prompts)) == 0
    assert main(asked(folder, "measure")) == 0
    capsys.readouterr()
    assert main(asked(folder, "measure", "--check")) == 2
    error = capsys.readouterr().err
    assert "the certificate of the exit before layer 1 was made of data" in error and error.count("\n") == 1


def test_a_certificate_that_its_data_do_not_give_is_refused(folder: Path, capsys: Capture) -> None:
    import msgspec

    assert main(asked(folder, "calibrate", *LOOSE)) == 0
    kept = Bundle.open(folder / "b").manifest.exit(1).certificate
    assert kept is not None
    put_certificates(folder / "b", {1: msgspec.structs.replace(kept, threshold=kept.threshold / 2)})
    capsys.readouterr()
    assert main(asked(folder, "measure", "--check")) == 2
    assert "and its data give threshold" in capsys.readouterr().err


def test_exits_of_another_model_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    write_tiny(tmp_path / "other", seed=4)
    mine, other = Bundle.open(folder / "b"), Bundle.open(tmp_path / "other")
    put_exits(tmp_path / "other", other.model_id, [(mine.exits[0], mine.read(mine.exits[0].file))])
    assert main(["exits", "calibrate", str(tmp_path / "other"), "--count", "4", "--work", str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"was trained for the model {mine.model_id}, not for {other.model_id}" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "b"], "nothing to train on; name files with --text"),
        (["train", "b", "--text", "prompts.txt"], "1 documents are too few"),
        (["train", "b", "--text", "none.txt"], "cannot be read as text"),
        (["train", "b", "--text", "texts.jsonl", "--layers", "0"], "no exit before layer 0; choose 1..3"),
        (["train", "b", "--text", "texts.jsonl", "--layers", "2,4"], "no exit before layer 4; choose 1..3"),
        (["train", "b", "--text", "texts.jsonl", "--layers", "2,1"], "give ascending numbers"),
        (["train", "b", "--text", "texts.jsonl", "--layers", "x"], "--layers is 'x'"),
        (["train", "b", "--text", "texts.jsonl", "--layers", "1,2", "--epochs", "1,2,3"], "--epochs is 1,2,3"),
        (["train", "b", "--text", "texts.jsonl", "--epochs", "0"], "--epochs is 0"),
        (["train", "nowhere", "--text", "texts.jsonl"], "holds no bundle"),
        (["calibrate", "plain"], "has no exits; train some: isthmus exits train"),
        (["calibrate", "b", "--layers", "3"], "has no exit before layer 3; choose one of 1, 2"),
        (["calibrate", "b", "--disagreement", "0"], "--disagreement 0 is impossible"),
        (["calibrate", "b", "--disagreement", "1.2"], "--disagreement 1.2 is impossible"),
        (["calibrate", "b", "--codec-loss", "1"], "--codec-loss 1 is impossible"),
        (["calibrate", "b", "--confidence", "nan"], "--confidence nan is impossible"),
        (["calibrate", "b", "--prompts", "none.txt"], "cannot be read as text"),
        (["measure", "plain"], "has no exits"),
        (["export", "plain", "-o", "x"], "has no exits"),
    ],
)
def test_mistakes_get_one_line_and_2(
    arguments: list[str], says: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    work = [] if arguments[0] == "export" else ["--work", str(folder / "work2")]
    assert main(["exits", *arguments, *work]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_long_prompts_are_left_out(folder: Path, capsys: Capture) -> None:
    (folder / "long.jsonl").write_text(json.dumps({"text": "x" * 600}))
    assert main(asked(folder, "measure", "--prompts", str(folder / "long.jsonl"))) == 2
    assert "no prompt leaves room for 120 tokens in a context of 512" in capsys.readouterr().err
