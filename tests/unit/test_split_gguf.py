"""GGUF files written by the gguf package, read back, damaged, and turned into bundles."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import ModelError
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.checkpoints import Checkpoint, open_checkpoint
from isthmus.split.gguf_file import GgufFile

gguf = pytest.importorskip("gguf")
TYPE = gguf.GGMLQuantizationType
D, FF, VOCAB, HEADS, KV_HEADS, HEAD = 256, 256, 64, 4, 2, 64


def shapes(n_experts: int = 0) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (HEADS * HEAD, D), "attn_k": (KV_HEADS * HEAD, D),
        "attn_v": (KV_HEADS * HEAD, D), "attn_output": (D, HEADS * HEAD),
    }  # fmt: skip
    if n_experts:
        found |= {"ffn_gate_inp": (n_experts, D), "ffn_gate_exps": (n_experts, FF, D)}
        return found | {"ffn_up_exps": (n_experts, FF, D), "ffn_down_exps": (n_experts, D, FF)}
    return found | {"ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF)}


def write(
    path: Path,
    kind: str = "Q8_0",
    *,
    arch: str = "llama",
    n_experts: int = 0,
    extra: dict[str, Any] | None = None,
    numbers: dict[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a model of two layers; gives the tensors' values as the file rounds them."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("general.languages", ["en", "日"])
    if n_experts:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(2)
    for name, number in (numbers or {}).items():
        writer.add_uint32(f"{arch}.{name}", number)
    values = {}
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    for i in range(2):
        tensors |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes(n_experts).items()}
    for name, shape in tensors.items():
        value = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1 and "gate_inp" not in name:
            raw = gguf.quants.quantize(value, TYPE[kind])
            value = gguf.quants.dequantize(raw, TYPE[kind]).astype(np.float32)
            writer.add_tensor(name, raw, raw_dtype=TYPE[kind])
        else:
            writer.add_tensor(name, value)
        values[name] = value
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter interleaves the halves of each head; this turns them back."""
    return rows.reshape(heads, HEAD // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def plain(weight: object) -> np.ndarray:
    return dequantize(weight) if isinstance(weight, PackedMatrix) else np.asarray(weight)


@pytest.mark.parametrize(
    ("kind", "format"), [("F32", "f32"), ("F16", "f16"), ("BF16", "bf16"), ("Q8_0", "q8"), ("Q5_0", "q8"),
                         ("Q4_0", "q4"), ("Q4_1", "q4m")]
)  # fmt: skip
def test_kept_tensors_are_the_same_numbers(tmp_path: Path, kind: str, format: str) -> None:
    values = write(tmp_path / "m.gguf", kind)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert (source.config.family, source.config.tied, source.config.vocab_size) == ("llama", True, VOCAB)
    assert source.embedding().format == format
    assert np.array_equal(plain(source.embedding()), values["token_embd.weight"])
    assert np.array_equal(plain(source.head()), values["token_embd.weight"])
    assert np.array_equal(source.final_norm(), values["output_norm.weight"])
    layer = source.layer(1)
    for role, name in {"v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
                       "attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}.items():  # fmt: skip
        assert np.array_equal(plain(layer[role]), values[f"blk.1.{name}.weight"]), role
    assert np.array_equal(plain(layer["q"]), unpermuted(values["blk.1.attn_q.weight"], HEADS))
    assert np.array_equal(plain(layer["k"]), unpermuted(values["blk.1.attn_k.weight"], KV_HEADS))


def test_only_llama_interleaves_heads(tmp_path: Path) -> None:
    norms = {f"blk.{i}.attn_{x}_norm.weight": np.ones(HEAD, np.float32) for i in range(2) for x in "qk"}
    values = write(tmp_path / "m.gguf", arch="qwen3", extra=norms)
    layer = open_checkpoint(tmp_path / "m.gguf").layer(0)
    assert np.array_equal(plain(layer["q"]), values["blk.0.attn_q.weight"])
    assert np.array_equal(plain(layer["q_norm"]), np.ones(HEAD))


def test_experts_share_a_tensor(tmp_path: Path) -> None:
    values = write(tmp_path / "m.gguf", "Q4_0", n_experts=3)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert source.config.family == "mixtral" and source.config.experts is not None
    layer = source.layer(1)
    assert np.array_equal(plain(layer["router"]), values["blk.1.ffn_gate_inp.weight"])
    for e in range(3):
        for role in ("gate", "up", "down"):
            assert np.array_equal(plain(layer[f"experts.{e}.{role}"]), values[f"blk.1.ffn_{role}_exps.weight"][e])


def test_shared_experts_and_their_gate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    own = {"gate": (80, D), "up": (80, D), "down": (D, 80)}
    extra = {
        f"blk.{i}.ffn_{x}_shexp.weight": rng.standard_normal(s).astype(np.float32)
        for i in range(2)
        for x, s in own.items()
    }
    extra |= {f"blk.{i}.ffn_gate_inp_shexp.weight": rng.standard_normal(D).astype(np.float32) for i in range(2)}
    for i in range(2):
        rows = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
        extra |= {f"blk.{i}.attn_{x}.bias": np.ones(n, np.float32) for x, n in rows.items()}
    numbers = {"expert_shared_feed_forward_length": 80}
    values = write(tmp_path / "m.gguf", arch="qwen2moe", n_experts=3, extra=extra, numbers=numbers)
    layer = open_checkpoint(tmp_path / "m.gguf").layer(1)
    assert np.array_equal(plain(layer["q"]), values["blk.1.attn_q.weight"])
    assert np.array_equal(plain(layer["shared.down"]), extra["blk.1.ffn_down_shexp.weight"])
    assert np.array_equal(plain(layer["shared_gate"])[0], extra["blk.1.ffn_gate_inp_shexp.weight"])
    assert np.array_equal(plain(layer["experts.2.up"]), values["blk.1.ffn_up_exps.weight"][2])


def test_olmoe_norms_all_heads_and_granite_interleaves(tmp_path: Path) -> None:
    rows = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD}
    norms = {f"blk.{i}.attn_{x}_norm.weight": np.arange(n, dtype=np.float32) for i in range(2) for x, n in rows.items()}
    values = write(tmp_path / "m.gguf", arch="olmoe", n_experts=3, extra=norms)
    layer = open_checkpoint(tmp_path / "m.gguf").layer(0)
    assert np.array_equal(plain(layer["q"]), values["blk.0.attn_q.weight"])
    assert np.array_equal(plain(layer["k_norm"]), np.arange(KV_HEADS * HEAD))
    values = write(tmp_path / "g.gguf", arch="granitemoe", n_experts=3)
    layer = open_checkpoint(tmp_path / "g.gguf").layer(0)
    assert np.array_equal(plain(layer["q"]), unpermuted(values["blk.0.attn_q.weight"], HEADS))


def test_a_target_format_is_what_quantizing_the_numbers_gives(tmp_path: Path) -> None:
    values = write(tmp_path / "m.gguf", "Q4_1")
    source = open_checkpoint(tmp_path / "m.gguf", format="nested")
    up, head = source.layer(0)["up"], source.embedding()
    assert isinstance(up, PackedMatrix) and (up.format, head.format) == ("n8", "q8")
    for name, array in quantize(values["blk.0.ffn_up.weight"], "n8").arrays.items():
        assert np.array_equal(up.arrays[name], array)
    assert open_checkpoint(tmp_path / "m.gguf", format="q4", head_format="q4").head().format == "q4"
    assert open_checkpoint(tmp_path / "m.gguf", format="q4", head_format="keep").head().format == "q4m"
    for wrong in ({"format": "q3"}, {"head_format": "q3"}):
        with pytest.raises(ModelError, match="'q3' is unknown"):
            open_checkpoint(tmp_path / "m.gguf", **wrong)


def test_unusual_types_need_a_target(tmp_path: Path) -> None:
    values = write(tmp_path / "m.gguf", "Q5_1")
    with pytest.raises(ModelError, match="cannot be kept; name a --format"):
        open_checkpoint(tmp_path / "m.gguf").layer(0)
    layer = open_checkpoint(tmp_path / "m.gguf", format="f32").layer(0)
    assert np.array_equal(plain(layer["up"]), values["blk.0.ffn_up.weight"])


@pytest.mark.parametrize("format", ["keep", "f32"])
def test_a_type_that_cannot_be_decoded_is_told(tmp_path: Path, format: str) -> None:
    write(tmp_path / "m.gguf", "F32")
    data, name = bytearray((tmp_path / "m.gguf").read_bytes()), b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 20  # behind the count of dimensions and two of them
    data[at : at + 4] = struct.pack("<I", TYPE.I32)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"tensor blk\.0\.ffn_up\.weight has type I32, which .* cannot decode; choose"):
        open_checkpoint(tmp_path / "m.gguf", format=format).layer(0)


def test_rope_factors_are_read(tmp_path: Path) -> None:
    factors = np.linspace(1, 4, HEAD // 2).astype(np.float32)
    write(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    write(tmp_path / "n.gguf")
    scaled, base = (open_checkpoint(tmp_path / f"{n}.gguf").config.rope_inv_freq for n in "mn")
    assert np.array_equal(np.array(scaled, np.float32), np.array(base, np.float32) / factors)


def test_unknown_and_missing_tensors_are_told(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", extra={"blk.0.attn_output.bias": np.ones(D, np.float32)})
    with pytest.raises(ModelError, match=r"blk\.0\.attn_output\.bias is not known in family llama"):
        open_checkpoint(tmp_path / "m.gguf")
    write(tmp_path / "q.gguf", arch="qwen2")
    with pytest.raises(ModelError, match=r"no tensor blk\.0\.attn_k\.bias"):
        open_checkpoint(tmp_path / "q.gguf")


def test_the_container_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "Q4_0")
    ours, theirs = GgufFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == expected and ours.fields["general.languages"] == ["en", "日"]
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type == tensor.tensor_type.name and found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert np.array_equal(found.raw.reshape(-1), tensor.data.view(np.uint8).reshape(-1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(path, "Q4_0")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("cut", "says"), [(0, "cannot read"), (3, "no GGUF"), (20, "damaged or truncated"), (300, "damaged or truncated"),
                      (-1, "ends beyond the file")]
)  # fmt: skip
def test_truncated_files_are_refused(tmp_path: Path, small: bytes, cut: int, says: str) -> None:
    (tmp_path / "t.gguf").write_bytes(small[:cut])
    with pytest.raises(ModelError, match=says):
        open_checkpoint(tmp_path / "t.gguf")


def test_wrong_versions_and_other_files_are_refused(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "v.gguf").write_bytes(small[:4] + b"\x09" + small[5:])
    with pytest.raises(ModelError, match="version 9"):
        open_checkpoint(tmp_path / "v.gguf")
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    for name, says in {"x.onnx": "is an ONNX graph", "none.gguf": "does not exist", ".": "no config.json"}.items():
        with pytest.raises(ModelError, match=says):
            open_checkpoint(tmp_path / name)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


LIST = struct.pack("<IIQqq", 9, 11, 2, 1, 2)  # the numbers 1 and 2 as metadata


@pytest.mark.parametrize(
    ("tensors", "fields", "says"),
    [
        (b"", {b"general.alignment": LIST}, "damaged or truncated"),
        (b"", {b"split.count": LIST}, "damaged or truncated"),
        (text(b"a") + struct.pack("<I", 2**32 - 1) + b"\0" * 99, {}, "tensor a of 4294967295 dimensions"),
    ],
)
def test_metadata_of_other_types_are_refused(
    tmp_path: Path, tensors: bytes, fields: dict[bytes, bytes], says: str
) -> None:
    head = struct.pack("<IQQ", 3, bool(tensors), len(fields)) + b"".join(text(k) + v for k, v in fields.items())
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + head + tensors)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.timeout(30)
def test_a_fifo_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="not a regular file"):
        open_checkpoint(tmp_path / "m.gguf")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_never_crash(tmp_path: Path, small: bytes, data: st.DataObject) -> None:
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzzed.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    try:
        source = open_checkpoint(path)
        assert isinstance(source, Checkpoint)
        source.layer(0)
    except ModelError as error:
        assert str(error)
