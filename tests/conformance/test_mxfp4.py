"""MXFP4 experts as gpt-oss ships them, against what `transformers` makes of the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

from safetensors.torch import save_file  # noqa: E402
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors  # noqa: E402

from isthmus.engine import open_part  # noqa: E402
from isthmus.engine.binding import cpu_names  # noqa: E402
from isthmus.engine.part import KvConfig, Rows, Want  # noqa: E402
from isthmus.protocol.errors import ModelError  # noqa: E402
from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.packed import PackedMatrix  # noqa: E402
from isthmus.split.checkpoints import open_checkpoint  # noqa: E402
from tests.conformance.tiny import VOCAB, Tiny, build, config_json  # noqa: E402


def packed(folder: Path, low: int = 118, high: int = 122) -> Tiny:
    """A tiny model whose experts are MXFP4 in its folder, and the same numbers in float32 in its `model`."""
    tiny = build("gpt_oss", folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, rows, cols // 32, 16)).astype(np.uint8))
        scales = torch.from_numpy(rng.integers(low, high, blocks.shape[:3]).astype(np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        tiny.model.get_parameter(name).data.copy_(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config_json(folder) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return tiny


@pytest.mark.parametrize(("low", "high", "format"), [(118, 122, "q8"), (60, 160, "")])
def test_experts_are_the_same_numbers(tmp_path: Path, low: int, high: int, format: str) -> None:
    tiny, source = packed(tmp_path, low, high), open_checkpoint(tmp_path, format="keep" if format else "f32")
    layer, prefix = source.layer(1), "model.layers.1.mlp.experts."
    both, down = (tiny.model.get_parameter(prefix + name).data.numpy() for name in ("gate_up_proj", "down_proj"))
    for e in range(len(both)):
        for role, expected in {"gate": both[e][:, 0::2].T, "up": both[e][:, 1::2].T, "down": down[e].T}.items():
            matrix = layer[f"experts.{e}.{role}"]
            assert isinstance(matrix, PackedMatrix) and matrix.format == (format or "f32")
            assert np.array_equal(dequantize(matrix), expected), role
    if not format:
        with pytest.raises(ModelError, match=r"gate_up_proj has a type that cannot be kept; name a --format"):
            open_checkpoint(tmp_path).layer(1)


@pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
def test_logits(tmp_path: Path) -> None:
    tiny, tokens = packed(tmp_path), np.random.default_rng(1).integers(0, VOCAB, 30).tolist()
    expected = tiny.logits([tokens])[0]
    part = open_part(open_checkpoint(tmp_path, format="f32"), 0, 3, backend="native", threads=1, kv=KvConfig("f32", 64))
    logits = part.step(Rows().tokens(part.open(), 0, tokens, want=Want.LOGITS, want_all=True)).logits
    assert (np.abs(logits - expected).max(1) / np.abs(expected).max(1)).max() < 1e-4


def test_blocks_that_do_not_fit_their_scales(tmp_path: Path) -> None:
    packed(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj is no MXFP4"):
        open_checkpoint(tmp_path).layer(0)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.experts\.down_proj"):
        open_checkpoint(tmp_path)
