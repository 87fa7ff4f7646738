"""Bundles: what is written is read back; what was altered is refused with a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import BundleError
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.files import locked
from isthmus.split.manifest import EMBEDDING, HEAD, NORM, Manifest, TokenizerEntry, layer_file, model_id
from isthmus.split.roles import Weights, array_shapes, matrix_shapes
from isthmus.split.tensorfile import encode
from isthmus.split.writer import BundleWriter, write_bundle


def config(**changes: Any) -> DecoderConfig:
    fields: dict[str, Any] = {
        "family": "llama", "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48,
        "vocab_size": 50, "context_length": 64, "norm_eps": 1e-5, "rope_inv_freq": (1.0, 0.1, 0.01, 0.001),
    }  # fmt: skip
    return DecoderConfig(**{**fields, **changes})


class Source:
    """Random weights; a layer's depend on its index alone."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def _random(self, index: int, *shape: int) -> NDArray[np.float32]:
        return np.random.default_rng((self.seed, index)).standard_normal(shape).astype(np.float32)

    def embedding(self) -> PackedMatrix:
        return quantize(self._random(100, self.config.vocab_size, self.config.d_model), "q8")

    def head(self) -> PackedMatrix:
        if self.config.tied:
            return self.embedding()
        return quantize(self._random(101, self.config.vocab_size, self.config.d_model), "q8")

    def final_norm(self) -> NDArray[np.float32]:
        return self._random(102, self.config.d_model)

    def layer(self, index: int) -> Weights:
        found: dict[str, PackedMatrix | NDArray[np.float32]] = {}
        for name, shape in array_shapes(self.config, index).items():
            found[name] = self._random(index, *shape)
        for name, size in matrix_shapes(self.config, index).items():
            found[name] = quantize(self._random(index, *size), "q4m")
        return found


def write(path: Path, source: Source | None = None, **options: Any) -> Manifest:
    return write_bundle(
        path, source or Source(config()), name="tiny", weights="q4m", tokenizer=b"{}", entry=TokenizerEntry(), **options
    )


def edit(path: Path, change: Mapping[str, Any]) -> None:
    file = path / "bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "b")
    return tmp_path / "b"


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True, "qk_norm": True, "windows": (0, 8, 8)}])
def test_what_was_written_is_read_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = Source(config(**changes))
    seen: list[tuple[str, int, int]] = []
    manifest = write(tmp_path / "b", source, progress=lambda *step: seen.append(step))
    assert seen[-1][1:] == (5, 5) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.config == source.config and bundle.manifest == manifest
    assert bundle.whole and bundle.held_layers == 3
    assert (HEAD in manifest.files) != source.config.tied
    assert np.array_equal(dequantize(bundle.embedding()), dequantize(source.embedding()))
    assert np.array_equal(dequantize(bundle.head()), dequantize(source.head()))
    assert np.array_equal(bundle.final_norm(), source.final_norm())
    for index in range(3):
        expected, found = source.layer(index), bundle.layer(index)
        assert set(found) == set(expected)
        for name, value in expected.items():
            back = found[name]
            if isinstance(value, PackedMatrix):
                assert isinstance(back, PackedMatrix) and back.format == "q4m"
                assert np.array_equal(dequantize(back), dequantize(value))
            else:
                assert isinstance(back, np.ndarray) and np.array_equal(back, value)


def test_model_id_is_of_weights_and_config_not_of_place_or_name(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    assert write(tmp_path / "deeper" / "b").model_id == first.model_id
    assert write(tmp_path / "c", Source(config(), seed=1)).model_id != first.model_id
    assert write(tmp_path / "d", Source(config(norm_eps=1e-6))).model_id != first.model_id
    assert len(bytes.fromhex(first.model_id)) == 16


def test_opening_reads_no_weights(folder: Path) -> None:
    before = (folder / EMBEDDING).read_bytes()
    (folder / EMBEDDING).write_bytes(bytes(len(before)))
    bundle = Bundle.open(folder)
    assert bundle.config.n_layers == 3
    with pytest.raises(BundleError, match=r"embed.safetensors was altered.*; remove it, and fetch or split"):
        bundle.embedding()


@pytest.mark.parametrize("name", [EMBEDDING, NORM, HEAD, layer_file(1), "tokenizer.json"])
def test_one_altered_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(folder).verify()
    others = [n for n in Bundle.open(folder).manifest.files if n != name]
    Bundle.open(folder).verify(others)


@pytest.mark.parametrize("name", [EMBEDDING, layer_file(2), "tokenizer.json"])
def test_a_truncated_file_is_told_when_opening(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{name.rpartition('/')[2]} has .* bytes instead of"):
        Bundle.open(folder)


def test_a_file_truncated_later_is_told_when_loading(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / layer_file(2)).write_bytes(b"short")
    with pytest.raises(BundleError, match="5 bytes instead of"):
        bundle.layer(2)


def test_a_partial_bundle_gives_what_it_holds(folder: Path) -> None:
    for name in (layer_file(2), HEAD, NORM):
        (folder / name).unlink()
    bundle = Bundle.open(folder)
    assert bundle.held_layers == 2 and not bundle.whole and not bundle.holds(HEAD)
    bundle.prefetch(0, 3)
    assert set(bundle.layer(1)) == set(matrix_shapes(bundle.config, 1)) | set(array_shapes(bundle.config, 1))
    bundle.verify()
    for load in (lambda: bundle.layer(2), bundle.head, bundle.final_norm, lambda: bundle.verify([HEAD])):
        with pytest.raises(BundleError, match="does not hold"):
            load()


def test_files_of_a_part(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert manifest.part_files(0, 2) == [EMBEDDING, layer_file(0), layer_file(1)]
    assert manifest.part_files(2, 3) == [layer_file(2), NORM, HEAD]
    tied = Manifest("n", "", config(tied=True), "keep", TokenizerEntry(), {})
    assert tied.part_files(2, 3) == [EMBEDDING, layer_file(2), NORM]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 2}, "format_version 2.*newer isthmus"),
        ({"format_version": 0}, "format_version 0.*split the model again"),
        ({"format_version": "1"}, "cannot be read"),
        ({"kind": "encoder"}, "kind is 'encoder'"),
        ({"kind": "graph"}, "of a network that was cut; open it with isthmus.edge.GraphDevice"),
        ({"files": {}}, "lists 0 files for 3 layers"),
        ({"model_id": "00"}, "does not follow"),
        ({"name": None}, "cannot be read"),
        ({"name": ""}, "the model's name is ''"),
        ({"name": "a\x1b[31mb"}, r"the model's name is 'a\\x1b\[31mb'"),
        ({"name": "two\nlines"}, "the model's name is"),
        ({"name": "x" * 201}, "1..200 printable characters"),
        ({"weights": "q4\x1b[2J"}, r"the weight format 'q4\\x1b\[2J'"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=says) as caught:
        Bundle.open(folder)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "gpt17"}, "family 'gpt17' is unknown; supported are llama"),
        ({"n_layers": 4}, "lists no weights/layer-003"),
        ({"n_layers": 10**9}, "lists 7 files for 1000000000 layers"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"d_model": "x"}, ".*"),
        ({"surprise": 1}, "does not fit"),
        ({"norm_eps": 0.5}, "does not follow"),
        ({"n_layers": 3.0}, "Expected `int`, got `float`"),
        ({"tied": "no"}, "Expected `bool`, got `str`"),
        ({"rope_inv_freq": ["1"] * 4}, "Expected `float`, got `str`"),
        ({"rope_inv_freq": [10**400] * 4}, "too large"),
        ({"windows": [-1, 0, 0]}, r"attention windows \(-1, 0, 0\)"),
        ({"windows": [2**31, 0, 0]}, "attention windows"),
    ],
)
def test_a_wrong_configuration_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    fields = json.loads((folder / "bundle.json").read_text())["config"]
    edit(folder, {"config": {**fields, **change}})
    with pytest.raises(BundleError, match=says):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bos": -5}, "tokenizer's bos is token -5 and the vocabulary has 50"),
        ({"bos": 50}, "tokenizer's bos is token 50"),
        ({"bos": 10**30}, "tokenizer's bos is token 10000"),
        ({"bos": 1.5}, "cannot be read"),
        ({"bos": True}, "cannot be read"),
        ({"eos": [1, -1]}, "tokenizer's eos is token -1"),
        ({"eos": [1, 2**32]}, "tokenizer's eos is token 4294967296"),
        ({"eos": [1] * 257}, "has 257 end tokens; at most 256"),
        ({"eos": [[]]}, "cannot be read"),
        ({"eos": "12"}, "cannot be read"),
        ({"chat_template": 5}, "cannot be read"),
    ],
)
def test_a_tokenizer_that_names_no_tokens_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    fields = json.loads((folder / "bundle.json").read_text())["tokenizer"]
    edit(folder, {"tokenizer": {**fields, **change}})
    with pytest.raises(BundleError, match=says) as caught:
        Bundle.open(folder)
    assert caught.value.remedy


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    entry = TokenizerEntry(eos=(50,))
    with pytest.raises(BundleError, match="eos is token 50"):
        write_bundle(tmp_path / "b", Source(config()), name="t", weights="q4m", tokenizer=b"{}", entry=entry)
    with pytest.raises(BundleError, match="the model's name is"):
        write_bundle(
            tmp_path / "b", Source(config()), name="\n", weights="q4m", tokenizer=b"{}", entry=TokenizerEntry()
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["bundle.json", EMBEDDING, layer_file(2), "tokenizer.json"])
def test_a_fifo_or_folder_in_the_place_of_a_file(folder: Path, name: str) -> None:
    opened = Bundle.open(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(folder)
    if name != "bundle.json":
        with pytest.raises(BundleError, match="not a regular file"):
            opened.verify([name])
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(folder)


@pytest.mark.timeout(30)
def test_a_device_in_the_place_of_the_manifest(folder: Path) -> None:
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(folder)


def test_links_that_lead_nowhere(folder: Path) -> None:
    (folder / layer_file(2)).unlink()
    (folder / layer_file(2)).symlink_to("gone")
    assert Bundle.open(folder).held_layers == 2
    (folder / layer_file(2)).unlink()
    (folder / layer_file(2)).symlink_to(Path(layer_file(2)).name)
    with pytest.raises(BundleError, match=r"leads nowhere|cannot be read"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "weights/../../x", "a\\b", "C:x", "", "a//b", ".", "weights/.."]
)
def test_paths_out_of_the_bundle_are_refused(folder: Path, name: str) -> None:
    fields = json.loads((folder / "bundle.json").read_text())
    fields["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    edit(folder, fields)
    with pytest.raises(BundleError, match="must lie inside its folder"):
        Bundle.open(folder)
    fields["files"].pop(name)
    fields["tokenizer"]["file"] = name
    edit(folder, fields)
    with pytest.raises(BundleError, match="lists no"):
        Bundle.open(folder)


def test_a_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / layer_file(0)).rename(tmp_path / "elsewhere")
    (folder / layer_file(0)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leads out of"):
        Bundle.open(folder)


def test_a_bundle_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link").verify()


def test_weights_of_another_shape_are_refused_though_the_hash_is_right(folder: Path) -> None:
    source = Source(config())
    layer = {**source.layer(0), "q": quantize(np.ones((16, 32), np.float32), "q8")}
    data = b"".join(encode(layer))
    replace(folder, layer_file(0), data)
    with pytest.raises(BundleError, match=r"'q' of layer 0 is \(16, 32\), not \(32, 32\)"):
        Bundle.open(folder).layer(0)
    without = {name: value for name, value in source.layer(0).items() if name != "up"}
    replace(folder, layer_file(0), b"".join(encode(without)))
    with pytest.raises(BundleError, match="'up' of layer 0 is missing"):
        Bundle.open(folder).layer(0)
    replace(folder, EMBEDDING, b"".join(encode({"embedding": quantize(np.ones((16, 32), np.float32), "q8")})))
    with pytest.raises(BundleError, match=r"is \[16, 32\], not \[50, 32\]"):
        Bundle.open(folder).embedding()


def replace(folder: Path, name: str, data: bytes) -> None:
    """Puts other bytes in place of a file and mends all hashes."""
    import hashlib

    manifest = Manifest.parse((folder / "bundle.json").read_bytes())
    entry = type(manifest.files[name])(len(data), hashlib.sha256(data).hexdigest())
    files = {**manifest.files, name: entry}
    identity = model_id(manifest.config, files)
    changed = Manifest(manifest.name, identity, manifest.config, manifest.weights, manifest.tokenizer, files)
    (folder / name).write_bytes(data)
    (folder / "bundle.json").write_bytes(changed.encode())


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no bundle.*isthmus split"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="holds no bundle"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="has no layer 7"):
        write(tmp_path / "b")
        Bundle.open(tmp_path / "b").layer(7)


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        write(folder)
    changed = write(folder, Source(config(), seed=9), force=True)
    assert Bundle.open(folder).model_id == changed.model_id
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match="is not a bundle"):
        write(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "mine"]


def test_nothing_half_written_remains(tmp_path: Path) -> None:
    class Failing(Source):
        def layer(self, index: int) -> Weights:
            if index == 2:
                raise KeyboardInterrupt
            return super().layer(index)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", Failing(config()))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="must lie inside"), BundleWriter(tmp_path / "c") as writer:
        writer.add("../out", [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_was_moved_aside_comes_back(folder: Path, tmp_path: Path) -> None:
    """A process that was killed between the two renames of `finish` has lost nothing."""
    folder.rename(tmp_path / ".b.abcdefgh.old")
    with pytest.raises(BundleError, match="exists already"):
        write(folder)
    Bundle.open(folder).verify()
    (tmp_path / ".b.abcdefgh.old").mkdir()
    write(folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_that_is_being_replaced_is_left_to_its_writer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, seen = Path.replace, list[str]()

    def replaced(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):  # another writer comes between the two renames
            BundleWriter(folder)
            seen.extend(sorted(path.suffix for path in tmp_path.iterdir()))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    changed = write(folder, Source(config(), seed=1), force=True)
    assert seen == [".old", ".part"]
    assert Bundle.open(folder).model_id == changed.model_id
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_that_another_process_writes_to_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    before = Bundle.open(folder).model_id
    with locked(folder), pytest.raises(BundleError, match="another process writes to"):
        write(folder, Source(config(), seed=1), force=True)
    assert Bundle.open(folder).model_id == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_end_between_the_renames_leaves_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Bundle.open(folder).model_id
    rename = Path.replace

    def ended(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise SystemExit(143)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", ended)
    with pytest.raises(SystemExit):
        write(folder, Source(config(), seed=1), force=True)
    assert Bundle.open(folder).model_id == before
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write to"):
        write(tmp_path / "file" / "b")


def test_without_force_a_bundle_that_came_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, began = BundleWriter.finish, False
    first: Manifest | None = None

    def late(self: BundleWriter, *given: Any) -> Manifest:
        nonlocal began, first
        if not began:
            began = True
            first = write(tmp_path / "b", Source(config(), seed=1))
        return finish(self, *given)

    monkeypatch.setattr(BundleWriter, "finish", late)
    with pytest.raises(BundleError, match="exists already"):
        write(tmp_path / "b", Source(config(), seed=2))
    assert first is not None and Bundle.open(tmp_path / "b").model_id == first.model_id
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
