"""A device fetches its part: only what it needs, resumable, and never a byte that does not fit its hash."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.cli.fetching import Fetching
from isthmus.edge import Timeouts, fetch_part
from isthmus.edge.link import Link
from isthmus.edge.options import layers_wanted
from isthmus.edge.provision import fetch_more, part_files, provision, wanted
from isthmus.edge.session import Session
from isthmus.edge.token import Mode
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import BundleError, DeviceError, LinkError
from isthmus.split.bundle import Bundle
from isthmus.split.exit_entry import Agreement, ExitEntry, exit_file
from isthmus.split.files import PARTIAL, locked
from isthmus.split.manifest import FileEntry, Manifest, TokenizerEntry, model_id
from tests.edge_world import LossyWire, ToyCloud
from tests.toy_part import CONFIG


def served() -> tuple[ToyCloud, Manifest]:
    """A cloud with a bundle of random bytes; the largest file takes several ranges."""
    noise = random.Random(5)
    names = ["tokenizer.json", "weights/embed.safetensors", "weights/norm.safetensors", "weights/head.safetensors"]
    names += [f"weights/layer-{i:03d}.safetensors" for i in range(CONFIG.n_layers)]
    files = {name: noise.randbytes(200_000 if "embed" in name else 1_000) for name in names}
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    manifest = Manifest("toy", model_id(CONFIG, entries), CONFIG, "keep", TokenizerEntry(), entries)
    cloud = ToyCloud(manifest.model_id)
    cloud.files, cloud.manifest = files, manifest.encode()
    return cloud, manifest


def link(wire: LossyWire, model_id: str = "") -> Link:
    patience = Timeouts(connect_ms=60_000, retry_ms=300, give_up_ms=2_000, progress_ms=600_000)
    return Link(Session(model_id, Chain(), patience), wire, wire.clock)


def held(cloud: ToyCloud, path: Path, layers: int) -> Bundle:
    """A bundle of which layers [0, layers) were fetched."""
    fetch_part(link(LossyWire(cloud)), path, layers=layers)
    return Bundle.open(path)


def asked(wire: LossyWire) -> list[Any]:
    return [x for x in wire.sent if isinstance(x, m.GetRange)]


@pytest.mark.parametrize(
    ("layers", "expected"), [(0, {"tokenizer"}), (2, {"tokenizer", "embed", "layer-000", "layer-001"})]
)
def test_only_the_part_is_fetched(tmp_path: Path, layers: int, expected: set[str]) -> None:
    cloud, manifest = served()
    fetch_part(link(LossyWire(cloud)), tmp_path / "b", layers=layers)
    found = {path.name.partition(".")[0] for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == expected | {"bundle"}
    bundle = Bundle.open(tmp_path / "b")
    assert (bundle.model_id, bundle.held_layers) == (manifest.model_id, layers)


def test_the_whole_bundle_arrives_over_a_bad_link(tmp_path: Path) -> None:
    cloud, _manifest = served()
    wire = LossyWire(cloud, 3, drop=0.2, repeat=0.2, delay_s=(0.001, 0.5))
    seen: list[tuple[str, int, int]] = []
    fetch_part(link(wire), tmp_path, progress=lambda *step: seen.append(step))
    bundle = Bundle.open(tmp_path)
    assert bundle.whole
    for name, data in cloud.files.items():
        assert (tmp_path / name).read_bytes() == data
        assert (name, len(data), len(data)) in seen
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))


def test_a_fetch_that_was_cut_goes_on_where_it_ended(tmp_path: Path) -> None:
    cloud, _manifest = served()
    wire = LossyWire(cloud)
    wire.die_after = 4
    with pytest.raises(LinkError, match="went away"):
        fetch_part(link(wire), tmp_path)
    assert not (tmp_path / "bundle.json").exists()
    partial = tmp_path / f"weights/embed.safetensors{PARTIAL}"
    held = partial.stat().st_size
    assert 0 < held < 200_000
    wire = LossyWire(cloud)
    fetch_part(link(wire), tmp_path)
    assert min(x.offset for x in asked(wire) if "embed" in x.name) == held
    assert all("tokenizer" not in x.name for x in asked(wire))
    assert Bundle.open(tmp_path).whole


def test_a_damaged_partial_file_is_fetched_again(tmp_path: Path) -> None:
    cloud, _manifest = served()
    (tmp_path / "weights").mkdir()
    for left in (b"x" * 1000, b"x" * 300_000):
        partial = tmp_path / f"weights/embed.safetensors{PARTIAL}"
        partial.write_bytes(left)
        (tmp_path / "weights/embed.safetensors").unlink(missing_ok=True)
        fetch_part(link(LossyWire(cloud)), tmp_path)
        assert (tmp_path / "weights/embed.safetensors").read_bytes() == cloud.files["weights/embed.safetensors"]


def test_a_cloud_that_sends_something_else_is_refused(tmp_path: Path) -> None:
    cloud, _manifest = served()
    name = "weights/layer-001.safetensors"
    cloud.files = {**cloud.files, name: bytes(1_000)}
    with pytest.raises(BundleError, match="another sha256"):
        fetch_part(link(LossyWire(cloud)), tmp_path)
    cloud.files = {**cloud.files, name: bytes(999)}
    with pytest.raises(BundleError, match="999 bytes instead of 1000"):
        fetch_part(link(LossyWire(cloud)), tmp_path)
    assert not (tmp_path / "bundle.json").exists()
    assert not (tmp_path / name).exists()
    with pytest.raises(BundleError, match="ask another cloud"):
        fetch_part(link(LossyWire(cloud)), tmp_path, model_id="00" * 16)


def test_layers_out_of_range() -> None:
    _, manifest = served()
    with pytest.raises(BundleError, match=r"7 layers are wanted of 6"):
        part_files(manifest, 7)
    assert "weights/head.safetensors" in part_files(manifest, None)
    assert "weights/head.safetensors" not in part_files(manifest, 5)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    cloud, _ = served()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeviceError, match="cannot write the bundle"):
        fetch_part(link(LossyWire(cloud)), tmp_path / "file" / "bundle")


def test_more_layers_are_fetched_and_nothing_twice(tmp_path: Path) -> None:
    cloud, manifest = served()
    bundle = held(cloud, tmp_path / "b", 2)
    wire = LossyWire(cloud)
    seen: list[tuple[str, int, int]] = []
    fetch_more(link(wire, manifest.model_id), bundle, 4, progress=lambda *step: seen.append(step))
    names = [f"weights/layer-{i:03d}.safetensors" for i in (2, 3)]
    assert sorted({x.name for x in asked(wire)}) == names == [name for name, _, _ in seen]
    assert bundle.held_layers == 4
    fetch_more(link(LossyWire(cloud), manifest.model_id), bundle, CONFIG.n_layers)
    assert bundle.whole
    bundle.verify([name for name in manifest.files if not name.startswith("weights/")])
    for name, data in cloud.files.items():
        assert (tmp_path / "b" / name).read_bytes() == data
    wire = LossyWire(cloud)
    fetch_more(link(wire, manifest.model_id), bundle, 6)
    assert wire.sent == []


def test_fetching_more_goes_on_where_it_ended(tmp_path: Path) -> None:
    cloud, manifest = served()
    bundle = held(cloud, tmp_path, 0)
    wire = LossyWire(cloud)
    wire.die_after = 3
    with pytest.raises(LinkError, match="went away"):
        fetch_more(link(wire, manifest.model_id), bundle, 1)
    begun = (tmp_path / f"weights/embed.safetensors{PARTIAL}").stat().st_size
    assert 0 < begun < 200_000 and Bundle.open(tmp_path).held_layers == 0
    wire = LossyWire(cloud)
    fetch_more(link(wire, manifest.model_id), bundle, 1)
    assert min(x.offset for x in asked(wire) if "embed" in x.name) == begun
    assert bundle.held_layers == 1 and not list(tmp_path.rglob(f"*{PARTIAL}"))


def test_more_of_another_model_or_with_another_hash_is_refused(tmp_path: Path) -> None:
    cloud, manifest = served()
    bundle = held(cloud, tmp_path, 1)
    name = "weights/layer-001.safetensors"
    with pytest.raises(DeviceError, match="not this bundle's model"):
        fetch_more(link(LossyWire(ToyCloud("00" * 16)), manifest.model_id), bundle, 2)
    cloud.files = {**cloud.files, name: bytes(1_000)}
    with pytest.raises(BundleError, match="another sha256"):
        fetch_more(link(LossyWire(cloud), manifest.model_id), bundle, 2)
    assert not (tmp_path / name).exists() and Bundle.open(tmp_path).held_layers == 1


def test_exits_come_with_the_layers_before_them(tmp_path: Path) -> None:
    cloud, plain = served()
    agreement = Agreement(0.5, 0.5)
    exits = tuple(ExitEntry(layer, exit_file(layer), 8, 0, agreement) for layer in (2, 4))
    noise = {entry.file: bytes([entry.layer]) * 1_000 for entry in exits}
    listed = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in noise.items()}
    manifest = Manifest("toy", plain.model_id, CONFIG, "keep", TokenizerEntry(), {**plain.files, **listed}, exits)
    cloud.files, cloud.manifest = {**cloud.files, **noise}, manifest.encode()
    assert [wanted(manifest, "exit", None, held) for held in (None, 1, 2, 3, 6)] == [4, 4, 2, 2, 4]
    assert wanted(manifest, "exit", 2) == 2 and wanted(manifest, "stream", None) == 0
    assert wanted(plain, "exit", None) == layers_wanted(CONFIG, "exit", None)
    head = [] if CONFIG.tied else ["weights/head.safetensors"]
    assert part_files(manifest, 3)[-1] == exit_file(2) and set(head) < set(part_files(manifest, 3))
    assert not set(noise) & set(part_files(manifest, 1)) and not set(head) & set(part_files(manifest, 1))
    bundle = provision(tmp_path / "b", lambda model: link(LossyWire(cloud), model), "exit", None)
    assert bundle.held_layers == 4 and all(bundle.holds(name) for name in noise)
    for name in noise:  # a folder that was fetched without them
        (tmp_path / "b" / name).unlink()
    bundle = provision(tmp_path / "b", lambda model: link(LossyWire(cloud), model), "exit", 2)
    assert bundle.holds(exit_file(2)) and not bundle.holds(exit_file(4))


def test_layers_that_a_mode_needs() -> None:
    modes: tuple[Mode, ...] = ("local", "stream", "split", "auto")
    for cut, held, layers in [
        (None, 2, [6, 0, 0, 0]),
        (4, 2, [6, 0, 4, 4]),
        (None, 0, [6, 0, 3, 0]),
        (None, None, [6, 0, 3, 6]),
        (4, None, [6, 0, 4, 6]),
    ]:
        assert [layers_wanted(CONFIG, mode, cut, held) for mode in modes] == layers
    for mode in modes:
        with pytest.raises(DeviceError, match="cut is 6 and the model has 6 layers"):
            layers_wanted(CONFIG, mode, 6)


@pytest.mark.parametrize(("cut", "layers"), [(None, 3), (1, 1), (5, 5)])
def test_an_empty_folder_gets_what_is_before_the_cut(cut: int | None, layers: int, tmp_path: Path) -> None:
    cloud, _ = served()
    wire = LossyWire(cloud)
    bundle = provision(tmp_path / "b", lambda model_id: link(wire, model_id), "split", cut)
    assert bundle.held_layers == layers
    assert not any(name in x.name for x in asked(wire) for name in (f"layer-{layers:03d}", "norm", "head"))


@pytest.mark.parametrize("mode", ["split", "auto"])
@pytest.mark.parametrize("cut", [0, 6, 7])
def test_no_such_cut_is_said_before_anything_is_fetched(mode: Mode, cut: int, tmp_path: Path) -> None:
    cloud, _ = served()
    wire = LossyWire(cloud)
    with pytest.raises(DeviceError, match=rf"cut is {cut} and the model has 6 layers; choose one in 1\.\.5"):
        provision(tmp_path / "b", lambda model_id: link(wire, model_id), mode, cut)
    assert (wire.sent, list(tmp_path.iterdir())) == ([], [])


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    cloud, manifest = served()
    bundle = held(cloud, tmp_path, 1)
    with locked(tmp_path):
        with pytest.raises(DeviceError, match=r"another process is fetching into .*; wait until it is done"):
            fetch_more(link(LossyWire(cloud), manifest.model_id), bundle, 2)
        with pytest.raises(DeviceError, match="another process is fetching"):
            fetch_part(link(LossyWire(cloud)), tmp_path)
    fetch_more(link(LossyWire(cloud), manifest.model_id), bundle, 2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["", PARTIAL])
def test_what_is_no_regular_file_is_replaced(tmp_path: Path, suffix: str) -> None:
    cloud, _ = served()
    (tmp_path / "weights").mkdir()
    for name in ("tokenizer.json", "weights/embed.safetensors"):
        os.mkfifo(tmp_path / f"{name}{suffix}")
    if suffix:
        os.mkfifo(tmp_path / f"bundle.json{PARTIAL}")
        (tmp_path / f"weights/norm.safetensors{PARTIAL}").symlink_to(tmp_path / "elsewhere")
    fetch_part(link(LossyWire(cloud)), tmp_path)
    assert Bundle.open(tmp_path).whole and not (tmp_path / "elsewhere").exists()
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))


@pytest.mark.parametrize(
    ("mode", "cut", "size_mb"), [("split", None, 5), ("split", 1, 3), ("auto", 1, 9), ("stream", None, 1)]
)
def test_the_size_that_is_announced_is_what_is_fetched(
    mode: Mode, cut: int | None, size_mb: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, manifest = served()
    small = {f"weights/{name}.safetensors": FileEntry(0, "0" * 64) for name in ("norm", "head")}
    files = {name: FileEntry(1_000_000, "0" * 64) for name in manifest.files} | small
    files["weights/layer-005.safetensors"] = FileEntry(2_000_000, "0" * 64)
    manifest = Manifest("toy", model_id(CONFIG, files), CONFIG, "keep", TokenizerEntry(), files)
    (tmp_path / f"bundle.json{PARTIAL}").write_bytes(manifest.encode())
    with Fetching(tmp_path, mode, cut) as fetching:
        fetching.progress("tokenizer.json", 1, 1)
    assert f"fetching toy ({size_mb} MB) into " in capsys.readouterr().err


def test_a_bundle_that_is_replaced_while_the_cloud_is_awaited_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud, _ = served()
    bundle = held(cloud, tmp_path / "b", 2)
    to_cloud = link(LossyWire(cloud), bundle.model_id)
    welcome = to_cloud.welcome

    def late() -> Any:
        files = {name: FileEntry(entry.bytes, "0" * 64) for name, entry in bundle.manifest.files.items()}
        other = Manifest("other", model_id(CONFIG, files), CONFIG, "keep", TokenizerEntry(), files)
        (bundle.path / "bundle.json").write_bytes(other.encode())
        return welcome()

    monkeypatch.setattr(to_cloud, "welcome", late)
    with pytest.raises(DeviceError, match="replaced meanwhile"):
        fetch_more(to_cloud, bundle, 4)
