"""`isthmus split` and `isthmus inspect` on a small GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.apps.cli.main import main
from isthmus.split.bundle import Bundle

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("cli") / "Small-1M.Q8_0.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{x}": (32, 32) for x in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["split", "graph.onnx", "-o", "x"], "is an ONNX graph"),
        (["split", "nothing.gguf", "-o", "x"], "does not exist"),
        (["split", "org/name", "-o", "x"], "isthmus fetch org/name"),
        (["split", "smollm2", "-o", "x"], "isthmus fetch smollm2"),
        (["split", "MODEL", "-o", "x", "--format", "q3"], "'q3' is unknown; choose one of keep, f32"),
        (["split", "MODEL", "-o", "."], "exists already"),
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
