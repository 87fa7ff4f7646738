"""Files that are none, folders that others use, and what killed processes leave behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.split.files import (
    PARTIAL,
    is_there,
    locked,
    open_regular,
    read_regular,
    regular_size,
    remove_left,
    work_folder,
)


def bind(path: Path) -> None:
    """Leaves a socket's name at `path`."""
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(path))


STRANGE: list[Callable[[Path], None]] = [
    os.mkfifo,
    Path.mkdir,
    bind,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/null"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", STRANGE)
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    make(Path("it"))
    for look in (open_regular, read_regular, regular_size):
        with pytest.raises(OSError, match="not a regular file"):
            look(Path("it"))


def test_regular_files_and_none(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"text")
    (tmp_path / "link").symlink_to("it")
    for name in ("it", "link"):
        assert (read_regular(tmp_path / name), regular_size(tmp_path / name)) == (b"text", 4)
    assert regular_size(tmp_path / "none") is None and regular_size(tmp_path / "it" / "none") is None
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    for name in ("null\0byte", "x" * 300):
        assert not is_there(tmp_path / name)
        with pytest.raises(OSError, match=r"null|too long"):
            open_regular(tmp_path / name)


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        assert held
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    with locked(tmp_path) as held:
        assert held
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none"):
        pass


def test_a_work_folder_goes_and_takes_those_that_were_left(tmp_path: Path) -> None:
    left, used, others = tmp_path / f".b.abcdefgh{PARTIAL}", tmp_path / f".b.01234567{PARTIAL}", []
    for name in (".b.abcdefgh", f".b.abc{PARTIAL}", f".b.c.abcdefgh{PARTIAL}", f".b.ABCDEFGH{PARTIAL}", f"b{PARTIAL}"):
        others.append(tmp_path / name)
    for folder in (left, used, *others):
        folder.mkdir()
        (folder / "file").write_text("")
    with locked(used), work_folder(tmp_path, ".b.") as work:
        (work / "file").write_text("")
        assert not left.exists()
        remove_left(tmp_path, ".b.")
        assert work.exists() and used.exists()
    assert not work.exists()
    assert all((folder / "file").exists() for folder in (used, *others))
    with work_folder(tmp_path, ".b.") as work:
        work.rename(tmp_path / "b")
    assert (tmp_path / "b").is_dir() and not used.exists()


def test_a_link_in_the_place_of_a_work_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / f".b.abcdefgh{PARTIAL}").symlink_to("mine")
    remove_left(tmp_path, ".b.")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
