"""Key files and the list of keys that are let in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.keys import (
    AllowList,
    check_key,
    default_folder,
    new_pair,
    read_device,
    read_pair,
    write_pair,
    write_trusted,
)

FIRST = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
SECOND = "#" + FIRST[1:]  # a key may begin like a comment


def test_a_pair_survives_and_the_secret_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "keys"
    pair = write_pair(folder, "device")
    assert read_pair(folder, "device") == pair
    assert stat.S_IMODE((folder / "device.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert pair.secret not in repr(pair)
    assert (folder / "device.pub").read_text().strip() == pair.public
    assert sorted(path.name for path in folder.iterdir()) == ["device.key", "device.pub"]


def test_a_pair_is_not_overwritten(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "device")
    with pytest.raises(ProtocolError, match=r"device\.key and .*device\.pub exist already"):
        write_pair(tmp_path, "device")
    assert read_pair(tmp_path, "device") == pair
    assert write_pair(tmp_path, "device", replace=True) != pair


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "device")
    (tmp_path / "device.key").chmod(0o644)
    with pytest.raises(ProtocolError, match="chmod 600"):
        read_pair(tmp_path, "device")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "device")
    (tmp_path / "device.pub").write_text(new_pair().public)
    with pytest.raises(ProtocolError, match="belong together"):
        read_pair(tmp_path, "device")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"device\.pub; run: isthmus keys new"):
        read_pair(tmp_path, "device")
    write_pair(tmp_path, "device")
    with pytest.raises(ProtocolError, match="isthmus keys trust"):
        read_device(tmp_path)
    (tmp_path / "server.pub").write_bytes(b"\xff\xfe")
    with pytest.raises(ProtocolError, match="server"):
        read_device(tmp_path)
    (tmp_path / "server.pub").write_text("short")
    with pytest.raises(ProtocolError, match="no CURVE key"):
        read_device(tmp_path)


def test_a_device_trusts_a_cloud(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "device")
    write_trusted(tmp_path, FIRST)
    keys = read_device(tmp_path)
    assert (keys.pair, keys.cloud) == (pair, FIRST)
    write_trusted(tmp_path, SECOND)
    assert read_device(tmp_path).cloud == SECOND


def test_a_clouds_own_key_is_not_replaced_by_trusting(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "server")
    with pytest.raises(ProtocolError, match="own keys"):
        write_trusted(tmp_path, FIRST)
    assert read_pair(tmp_path, "server") == pair


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a b", "ä"])
def test_unfit_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProtocolError, match="no name"):
        write_pair(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", FIRST[:-1], FIRST + "x", FIRST[:-1] + " ", FIRST[:-1] + "\n"])
def test_unfit_keys_are_refused(key: str) -> None:
    with pytest.raises(ProtocolError, match="no CURVE key"):
        check_key(key)


def test_several_keys_of_one_principal(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    assert allowed.principal(FIRST) is None
    allowed.allow(FIRST, "anna")
    allowed.allow(SECOND, "anna")
    again = AllowList(tmp_path / "allowed")
    assert again.entries() == [(FIRST, "anna"), (SECOND, "anna")]
    assert again.principal(SECOND) == "anna"
    assert again.revoke("anna") == 2
    assert again.revoke("anna") == 0
    assert AllowList(tmp_path / "allowed").entries() == []


def test_the_list_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    allowed = AllowList(path)
    AllowList(path).allow(FIRST, "anna")
    assert allowed.principal(FIRST) is None
    assert allowed.refresh()
    assert allowed.principal(FIRST) == "anna"
    assert not allowed.refresh()
    path.unlink()
    assert allowed.refresh()
    assert allowed.principal(FIRST) is None


def test_a_broken_line_leaves_the_list_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    path.write_text(f"# devices\n\n{FIRST} anna\n")
    allowed = AllowList(path)
    path.write_text(f"{FIRST} anna\nnonsense line\n")
    with pytest.raises(ProtocolError, match="line 2"):
        allowed.refresh()
    assert allowed.principal(FIRST) == "anna"


def test_the_default_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_KEYS", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("ISTHMUS_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", os.fspath(tmp_path / "config"))
    assert default_folder() == tmp_path / "config" / "isthmus" / "keys"


def test_keys_can_be_given_on_a_command_line() -> None:
    assert all(not key.startswith("-") and "!" not in key for key in (new_pair().public for _ in range(200)))


def test_a_pair_of_another_name_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "phone")
    with pytest.raises(ProtocolError, match=r"has phone\.key: rename .* or run: isthmus keys new --keys"):
        read_device(tmp_path)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ISTHMUS_KEYS", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ProtocolError, match="set ISTHMUS_KEYS"):
        default_folder()
