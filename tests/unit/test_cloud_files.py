"""A bundle given out in ranges: what the manifest lists and nothing else, and never before decode."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from isthmus.cloud.files import BundleFiles
from isthmus.cloud.models import serve_part
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import BundleError
from tests.cloud_world import PROMPT, World, code
from tests.fakes import FakePart


def test_ranges_wait_for_decode(tmp_path: Path) -> None:
    world = World(serve_part(FakePart(), "aa", "fake", files=bundle(tmp_path)))
    world.open()
    world.open(b"b", session=b"b" * 16)
    world.wire.put(m.Generate(1, 1, 0, Chain().head, PROMPT, 10))
    digest = hashlib.sha256(DATA).hexdigest()
    for offset in range(0, 20000, 1000):
        world.wire.put(m.GetRange("aa", "weights/one.bin", digest, offset, 1000), b"b")
    world.service.turn(0.0)
    assert len(world.wire.take(b"b")) == 1
    for _ in range(25):
        world.service.turn(0.0)
    assert b"".join(answer.data for answer in world.wire.take(b"b") if isinstance(answer, m.Range)) == DATA[1000:20000]
    assert len(world.wire.take()) == 10


DATA = bytes(range(256)) * 300


def bundle(folder: Path) -> BundleFiles:
    (folder / "weights").mkdir()
    (folder / "weights" / "one.bin").write_bytes(DATA)
    (folder.parent / "secret").write_text("secret")
    entries = {
        "weights/one.bin": {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()},
        "../secret": {"bytes": 6, "sha256": "0" * 64},
        "absent": {"bytes": 6, "sha256": "0" * 64},
        "weights": {"bytes": 6, "sha256": "0" * 64},
    }
    (folder / "bundle.json").write_text(json.dumps({"files": entries}))
    (folder / "private.key").write_text("secret")
    return BundleFiles(folder)


def test_a_bundle_is_given_out_in_ranges_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = bundle(folder)
    world = World(serve_part(FakePart(), "aa", "fake", files=files))
    (_, manifest) = world.ask(m.Hello(1, 1), m.GetManifest(""))
    assert manifest.data == (folder / "bundle.json").read_bytes()
    digest = hashlib.sha256(DATA).hexdigest()
    whole = b""
    while True:
        (answer,) = world.ask(m.GetRange("aa", "weights/one.bin", digest, len(whole), 65536))
        assert answer.total_bytes == len(DATA)
        assert answer.offset == len(whole)
        if not answer.data:
            break
        whole += answer.data
    assert whole == DATA
    for name in ("../secret", "absent", "weights", "private.key", "bundle.json", "/etc/passwd", ""):
        (fault,) = world.ask(m.GetRange("aa", name, "0" * 64, 0, 100))
        assert code(fault) == m.Code.NOT_FOUND
    (fault,) = world.ask(m.GetRange("aa", "weights/one.bin", "1" * 64, 0, 100))
    assert code(fault) == m.Code.NOT_FOUND


def test_a_cloud_may_keep_its_bundle() -> None:
    world = World()
    _, fault = world.ask(m.Hello(1, 1), m.GetManifest("aa"))
    assert code(fault) == m.Code.NOT_FOUND


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        BundleFiles(tmp_path)
