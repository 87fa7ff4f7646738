"""Exits in a bundle: listed, checked, loaded, and refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from isthmus.protocol.errors import BundleError
from isthmus.quant.groups import QUANTIZABLE, dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split import shipped as heads
from isthmus.split.bundle import Bundle
from isthmus.split.certificate import Certificate
from isthmus.split.exit_entry import CodecChoice, ExitEntry, exit_file
from isthmus.split.exit_writer import put_certificates, put_codecs, put_exits
from isthmus.split.exits import ExitSource, head_rows
from isthmus.split.files import locked
from isthmus.split.manifest import Manifest
from tests import edge_bundle
from tests.edge_bundle import CONFIG

WIDTH = CONFIG.d_model
weights = edge_bundle.exit_weights
an_exit = edge_bundle.an_exit
TOKENS = np.array([0, 3, 17, 40, 257], np.int32)


def certificate(data: bytes) -> Certificate:
    return Certificate(hashlib.sha256(data).hexdigest(), "cd" * 32, 400, 9000, 0.05, 0.95, 0.8, 0.03, 0.04, 0.4)


def codec(data: bytes, name: str = "ecsq4", row_bytes: float = 30.0) -> CodecChoice:
    return CodecChoice(name, hashlib.sha256(data).hexdigest(), "cd" * 32, 9000, 0.02, 0.96, 0.97, row_bytes)


def write_tiny(folder: Path, seed: int = 0) -> Manifest:
    return Bundle.open(edge_bundle.write_tiny(folder, seed)).manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "b")
    return tmp_path / "b"


def edit(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "bundle.json"
    fields = json.loads(file.read_text())
    fields["exits"][0] |= change
    file.write_text(json.dumps(fields))


def test_a_bundle_without_exits_stays_as_it_was(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.exits == () and bundle.manifest.exit_files() == []
    assert b'"exits"' not in bundle.manifest.encode()
    with pytest.raises(BundleError, match="no exit before layer 2; train some: isthmus exits train"):
        bundle.exit(2)


def test_exits_are_read_as_they_were_written(folder: Path) -> None:
    before = Bundle.open(folder)
    put_exits(folder, before.model_id, [an_exit(before.model_id, 3), an_exit(before.model_id, 1, 5, TOKENS)])
    bundle = Bundle.open(folder)
    assert bundle.model_id == before.model_id
    assert [(entry.layer, entry.head_tokens) for entry in bundle.exits] == [(1, 5), (3, 0)]
    assert Manifest.parse(bundle.manifest.encode()) == bundle.manifest
    assert bundle.manifest.exit_files() == ["exits/layer-001.safetensors", "exits/layer-003.safetensors"]
    assert bundle.manifest.exit_files([3]) == ["exits/layer-003.safetensors"]
    assert not set(bundle.manifest.part_files(0, 4)) & set(bundle.manifest.exit_files())
    bundle.verify()
    found, wanted = bundle.exit(1), weights(5)
    for name, value in found.layer(1).items():
        given = wanted[name]
        if isinstance(value, PackedMatrix) and isinstance(given, PackedMatrix):
            np.testing.assert_array_equal(dequantize(value), dequantize(given))
        else:
            np.testing.assert_array_equal(value, given)
    np.testing.assert_array_equal(found.channel_mean, wanted["channel_mean"])
    np.testing.assert_array_equal(found.channel_spread, wanted["channel_spread"])
    tokens = found.head_tokens()
    assert tokens is not None and tokens.tolist() == TOKENS.tolist() and found.config.d_ff == 48
    np.testing.assert_array_equal(dequantize(found.head()), dequantize(bundle.head())[TOKENS])
    assert bundle.exit(3).head_tokens() is None and bundle.exit(3).head().rows == CONFIG.vocab_size
    with pytest.raises(BundleError, match="no exit before layer 2; choose one of 1, 3"):
        bundle.exit(2)


@pytest.mark.parametrize("format", QUANTIZABLE)
def test_rows_of_a_head_are_the_heads(format: str) -> None:
    matrix = quantize(np.random.default_rng(0).standard_normal((70, 40)).astype(np.float32), format)
    rows = np.array([0, 15, 16, 31, *range(40, 60), 69], np.int32)
    taken = head_rows(matrix, rows)
    assert (taken.format, taken.rows, taken.cols) == (format, len(rows), 40)
    np.testing.assert_array_equal(dequantize(taken), dequantize(matrix)[rows])


def test_an_exit_is_replaced_and_its_certificate_goes(folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    first, second = an_exit(model_id), an_exit(model_id, seed=1)
    put_exits(folder, model_id, [first, an_exit(model_id, 3)])
    put_certificates(folder, {2: certificate(first[1])})
    assert Bundle.open(folder).manifest.exit(2).certificate == certificate(first[1])
    put_exits(folder, model_id, [second])
    bundle = Bundle.open(folder)
    assert bundle.manifest.exit(2).certificate is None and len(bundle.exits) == 2
    assert bundle.read(exit_file(2)) == second[1]
    with pytest.raises(BundleError, match="a certificate of other weights; calibrate it again"):
        put_certificates(folder, {2: certificate(first[1])})
    put_certificates(folder, {2: certificate(second[1])})
    put_certificates(folder, {2: None})
    assert Bundle.open(folder).manifest.exit(2).certificate is None


def test_a_codec_stays_as_long_as_its_exit(folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    first, second = an_exit(model_id), an_exit(model_id, seed=1)
    put_exits(folder, model_id, [first, an_exit(model_id, 3)])
    put_certificates(folder, {2: certificate(first[1])})
    put_codecs(folder, {2: codec(first[1])})
    kept = Bundle.open(folder).manifest.exit(2)
    assert (kept.codec, kept.certificate) == (codec(first[1]), certificate(first[1]))
    put_exits(folder, model_id, [first])  # the same weights again
    assert Bundle.open(folder).manifest.exit(2) == kept
    put_exits(folder, model_id, [second])
    assert Bundle.open(folder).manifest.exit(2).codec is None
    with pytest.raises(BundleError, match="a codec that was measured with other weights; calibrate it again"):
        put_codecs(folder, {2: codec(first[1])})
    with pytest.raises(BundleError, match="a codec 'ecsq9' that is not known; calibrate it again"):
        put_codecs(folder, {2: codec(second[1], "ecsq9")})
    for row_bytes in (0.0, -1.0, 2.0**20):
        with pytest.raises(BundleError, match="values that cannot be; calibrate it again"):
            put_codecs(folder, {2: codec(second[1], row_bytes=row_bytes)})
    put_codecs(folder, {2: codec(second[1])})
    put_codecs(folder, {2: None})
    assert Bundle.open(folder).manifest.exit(2).codec is None


def test_who_is_killed_while_an_exit_is_replaced_leaves_a_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.split import exit_writer, rewriting

    model_id = Bundle.open(folder).model_id
    put_exits(folder, model_id, [an_exit(model_id), an_exit(model_id, 3)])
    whole, left = rewriting.put_file, 0

    def write(target: Path, data: bytes) -> None:
        nonlocal left
        if not left:
            raise SystemExit
        left -= 1
        whole(target, data)

    for module in (exit_writer, rewriting):
        monkeypatch.setattr(module, "put_file", write)
    for killed_after in range(3):
        left = 100
        put_exits(folder, model_id, [an_exit(model_id)])
        left = killed_after
        with pytest.raises(SystemExit):
            put_exits(folder, model_id, [an_exit(model_id, seed=1)])
        Bundle.open(folder).verify()
    monkeypatch.undo()
    put_exits(folder, model_id, [an_exit(model_id, seed=1)])
    assert [entry.layer for entry in Bundle.open(folder).exits] == [2, 3]


def test_exits_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    model_id = Bundle.open(folder).model_id
    other = write_tiny(tmp_path / "other", seed=9).model_id
    with pytest.raises(BundleError, match=f"trained for the model {other}, and .* holds {model_id}"):
        put_exits(folder, other, [an_exit(other)])
    put_exits(folder, model_id, [an_exit(other)])  # by somebody who says what is not so
    with pytest.raises(BundleError, match=f"layer-002.safetensors was trained for the model {other}, not for"):
        Bundle.open(folder).exit(2)


def test_an_altered_or_absent_exit_is_refused(folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    _, data = an_exit(model_id)
    put_exits(folder, model_id, [an_exit(model_id)])
    file = folder / exit_file(2)
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(folder).exit(2)
    file.unlink()
    with pytest.raises(BundleError, match="does not hold exits/layer-002"):
        Bundle.open(folder).exit(2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": 0}, "an exit before layer 0 of 4"),
        ({"layer": 4}, "an exit before layer 4 of 4"),
        ({"layer": 3}, "no file exits/layer-003"),
        ({"file": "weights/embed.safetensors"}, "no file exits/layer-002"),
        ({"file": "../x"}, "no file exits/layer-002"),
        ({"d_ff": 0}, "values that cannot be"),
        ({"head_tokens": 8193}, "values that cannot be"),
        ({"agreement": {"documents": 1.5, "answers": 0}}, "values that cannot be"),
        ({"agreement": 1}, "cannot be read"),
        ({"certificate": {}}, "cannot be read"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(change: dict[str, Any], says: str, folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    put_exits(folder, model_id, [an_exit(model_id)])
    edit(folder, change)
    with pytest.raises(BundleError, match=says):
        Bundle.open(folder)


def test_an_entry_that_does_not_fit_its_file_is_refused(folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    put_exits(folder, model_id, [an_exit(model_id)])
    edit(folder, {"head_tokens": 7})
    with pytest.raises(BundleError, match=r"has d_ff 48 and 0 head tokens, which is not what bundle\.json says"):
        Bundle.open(folder).exit(2)


@pytest.mark.parametrize("tokens", [[], [3, 3], [4, 2], [-1, 2], [2, 258], [[1, 2]]])
def test_tokens_that_do_not_ascend_in_the_vocabulary_are_refused(tokens: list[Any], folder: Path) -> None:
    with pytest.raises(BundleError, match="head_tokens that do not ascend within the vocabulary of 258"):
        ExitSource(Bundle.open(folder), 2, weights(), np.array(tokens, np.int32))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("channel_mean", np.zeros(3, np.float32), "no finite channel_mean"),
        ("channel_spread", np.full(WIDTH, np.nan, np.float32), "no finite channel_spread"),
        ("channel_spread", np.full(WIDTH, -1, np.float32), "negative channel_spread"),
    ],
)
def test_channels_that_cannot_be_are_refused(name: str, value: Any, says: str, folder: Path) -> None:
    with pytest.raises(BundleError, match=says):
        ExitSource(Bundle.open(folder), 2, {**weights(), name: value})


@pytest.mark.parametrize("change", [{"layer_norm": True}, {"head_bias": True}, {"logit_scale": 0.5}])
def test_models_whose_heads_exits_cannot_use_are_refused(change: dict[str, Any]) -> None:
    model = cast(Bundle, SimpleNamespace(config=replace(CONFIG, **change)))
    with pytest.raises(BundleError, match=f"exits of models with {next(iter(change))} are not supported"):
        ExitSource(model, 2, weights())


def test_an_exit_has_nothing_special(folder: Path) -> None:
    model = cast(Bundle, SimpleNamespace(config=replace(CONFIG, o_bias=True, residual_scale=0.5, sink_logits=True)))
    assert not ExitSource(model, 2, weights()).config.special


def test_only_one_process_writes(folder: Path) -> None:
    model_id = Bundle.open(folder).model_id
    with locked(folder), pytest.raises(BundleError, match="another process writes"):
        put_exits(folder, model_id, [an_exit(model_id)])


def shelf(folder: Path, model_id: str) -> list[tuple[ExitEntry, bytes]]:
    """Heads as they come with the package."""
    (folder / "tiny").mkdir(parents=True)
    exits = [an_exit(model_id, 1), an_exit(model_id, 2)]
    names = {entry.layer: Path(entry.file).name for entry, _ in exits}
    for entry, data in exits:
        (folder / "tiny" / names[entry.layer]).write_bytes(data)
    hashes = {names[entry.layer]: hashlib.sha256(data).hexdigest() for entry, data in exits}
    listed = heads.Heads(model_id, ("isthmus exits train",), hashes, tuple(entry for entry, _ in exits))
    (folder / "tiny" / heads.LIST).write_bytes(msgspec.json.encode(listed))
    return exits


def test_a_bundle_takes_up_the_exits_that_come_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_tiny(tmp_path / "plain")
    given = shelf(tmp_path / "heads", plain.model_id)
    assert heads.shipped(plain.model_id, tmp_path / "heads") == given
    assert heads.shipped("another", tmp_path / "heads") == []
    monkeypatch.setattr("isthmus.split.writer.shipped", lambda model_id: heads.shipped(model_id, tmp_path / "heads"))
    assert write_tiny(tmp_path / "b").exits == tuple(entry for entry, _ in given)
    assert write_tiny(tmp_path / "other", seed=5).exits == ()
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.model_id == plain.model_id and bundle.exit(2).config.d_ff == 48
    bundle.verify()


def test_altered_heads_are_refused(tmp_path: Path) -> None:
    shelf(tmp_path, "aa")
    (tmp_path / "tiny" / "layer-002.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="was altered: its sha256"):
        heads.shipped("aa", tmp_path)
    (tmp_path / "tiny" / "layer-002.safetensors").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        heads.shipped("aa", tmp_path)
    (tmp_path / "tiny" / heads.LIST).write_text("{")
    with pytest.raises(BundleError, match="install isthmus again"):
        heads.shipped("aa", tmp_path)


@pytest.mark.parametrize("name", ["final_norm", "down"])
def test_weights_that_are_not_finite_are_refused(name: str, folder: Path) -> None:
    broken = weights()
    weight: Any = broken[name]
    arrays = weight.arrays.values() if name == "down" else [weight]
    next(one for one in arrays if one.dtype.kind == "f").reshape(-1)[3] = np.nan
    with pytest.raises(BundleError, match=f"has a {name} that is not finite"):
        ExitSource(Bundle.open(folder), 2, broken)
