"""`isthmus split` and `isthmus inspect` on a small GGUF file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.apps.cli.main import main
from isthmus.split.bundle import Bundle

pytest.importorskip("gguf")
from tests.edge_bundle import an_exit
from tests.small_gguf import write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("cli") / "Small-1M.Q8_0.gguf")


def test_split_and_inspect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(model), "-o", str(tmp_path / "b")]) == 0
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.name == "Small-1M" and bundle.manifest.weights == "keep"
    assert bundle.tokenizer().decode(bundle.tokenizer().encode("hi é")) == "hi é"
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "b"), "--json", "--verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] and facts["layers_here"] == 1 and facts["config"]["family"] == "llama"
    assert facts["model_id"] == bundle.model_id
    formats = {file["name"]: file["formats"] for file in facts["files"]}
    assert formats["weights/layer-000.safetensors"] == ["q8"] and formats["tokenizer.json"] == []
    assert (
        facts["bytes"]
        == sum(path.stat().st_size for path in (tmp_path / "b").rglob("*.*"))
        - (tmp_path / "b" / "bundle.json").stat().st_size
    )
    assert main(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "1 layers, width 32" in shown and "weights/embed.safetensors" in shown and "--verify compares" in shown


def test_formats_names_and_force(model: Path, tmp_path: Path) -> None:
    target = ["-o", str(tmp_path / "b")]
    assert main(["split", str(model), *target, "--format", "nested", "--name", "mine"]) == 0
    bundle = Bundle.open(tmp_path / "b")
    assert (bundle.name, bundle.manifest.weights, bundle.embedding().format) == ("mine", "nested", "q8")
    assert main(["split", str(model), *target, "--format", "q4", "--head", "f16", "--force"]) == 0
    again = Bundle.open(tmp_path / "b")
    assert again.embedding().format == "f16" and again.model_id != bundle.model_id


def test_split_says_which_exits_it_put_in(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["split", str(model), "-o", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    manifest = Bundle.open(tmp_path / "b").manifest
    exits = tuple(an_exit(manifest.model_id, layer)[0] for layer in (1, 3))
    monkeypatch.setattr("isthmus.split.writer.write_bundle", lambda *_, **__: replace(manifest, exits=exits))
    assert main(["split", str(model), "-o", str(tmp_path / "c")]) == 0
    assert "\nearly exits before layers 1, 3: they come with isthmus for this model\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["split", "graph.onnx", "-o", "x"], "needs a plan that says where to cut it"),
        (["split", "nothing.gguf", "-o", "x"], "does not exist"),
        (["split", "org/name", "-o", "x"], "isthmus fetch org/name"),
        (["split", "smollm2", "-o", "x"], "isthmus fetch smollm2"),
        (["split", "MODEL", "-o", "x", "--format", "q3"], "'q3' is unknown; choose one of keep, f32"),
        (["split", "MODEL", "-o", "."], "exists already"),
        (["split", "x" * 300, "-o", "x"], "does not exist"),
        (["split", "a/" + "x" * 300, "-o", "x"], "is not on this machine"),
        (["split", "MODEL", "-o", "x" * 300], "File name too long"),
        (["split", "MODEL", "-o", "x", "--name", "a\x1b[31mb"], "the model's name is 'a\\x1b[31mb'"),
        (["split", "MODEL", "-o", "x", "--name", "a" * 201], "choose another with --name: 1..200"),
        (["split", "MODEL", "-o", ".."], "exists already"),
        (["inspect", "."], "holds no bundle"),
        (["fetch", "nope"], "no model is called 'nope'"),
    ],
)
def test_mistakes_get_one_line_and_2(
    arguments: list[str], says: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    assert main([str(model) if argument == "MODEL" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_what_is_no_regular_file_is_no_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    (tmp_path / "null.gguf").symlink_to("/dev/null")
    (tmp_path / "hf").mkdir()
    os.mkfifo(tmp_path / "hf" / "config.json")
    for name in ("m.gguf", "null.gguf", "hf"):
        assert main(["split", str(tmp_path / name), "-o", str(tmp_path / "b")]) == 2
        error = capsys.readouterr().err
        assert "not a regular file" in error and error.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["[bold]", "a b", "*?[x]", "-x", "é日"])
def test_folders_of_any_name(model: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(model), "-o", str(tmp_path / name), "--name", "[/bold] 日"]) == 0
    assert f"{tmp_path / name}: [/bold] 日, 1 layers" in capsys.readouterr().err
    assert Bundle.open(tmp_path / name).name == "[/bold] 日"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_stays_and_its_target_is_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    assert main(["split", str(model), "-o", str(tmp_path / "link"), "--name", "first"]) == 0
    assert main(["split", str(model), "-o", str(tmp_path / "link"), "--name", "second", "--force"]) == 0
    assert (tmp_path / "link").is_symlink() and Bundle.open(tmp_path / "real").name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    (tmp_path / "loop").symlink_to("loop")
    assert main(["split", str(model), "-o", str(tmp_path / "loop"), "--force"]) == 2


def test_a_bundle_is_no_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(model), "-o", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["split", str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 2
    assert "is a bundle already" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_inspect_tells_what_is_here(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(model), "-o", str(tmp_path / "b"), "--name", "[red]x"]) == 0
    (tmp_path / "b" / "weights" / "layer-000.safetensors").unlink()
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "[red]x" in shown and "0 of 1 layers" in shown and "not here" in shown
    assert main(["inspect", str(tmp_path / "b"), "--verify"]) == 0
    assert "all files here are what the bundle says" in capsys.readouterr().out
