"""A device fetches its part: only what it needs, resumable, and never a byte that does not fit its hash."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge import Timeouts, fetch_part
from isthmus.edge.link import Link
from isthmus.edge.provision import PARTIAL, part_files
from isthmus.edge.session import Session
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import BundleError, DeviceError, LinkError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import FileEntry, Manifest, TokenizerEntry, model_id
from tests.edge_world import CONFIG, LossyWire, ToyCloud


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


def link(wire: LossyWire) -> Link:
    patience = Timeouts(connect_ms=60_000, retry_ms=300, give_up_ms=2_000, progress_ms=600_000)
    return Link(Session("", Chain(), patience), wire, wire.clock)


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
