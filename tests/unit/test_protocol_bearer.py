"""Lists of bearer tokens, and keys that a cloud lends."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.protocol.bearer import TokenList
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.keys import AllowList, new_pair


def test_a_token_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "tokens"
    tokens = TokenList(path)
    token = tokens.issue("alice")
    assert tokens.owner(token) == "alice" and TokenList(path).owner(token) == "alice"
    assert token not in path.read_text() and not path.stat().st_mode & 0o077
    digest, owner = tokens.entries()[0]
    assert owner == "alice" and tokens.owner(digest) is None
    assert tokens.owner("") is None and tokens.owner(token[:-1]) is None and tokens.owner("\udc80") is None


def test_tokens_are_withdrawn_by_any_name(tmp_path: Path) -> None:
    tokens = TokenList(tmp_path / "tokens")
    first, second, _ = tokens.issue("alice"), tokens.issue("bob"), tokens.issue("bob")
    assert tokens.withdraw(first) == 1 and tokens.owner(first) is None
    assert tokens.withdraw(first) == 0
    assert tokens.withdraw("bob") == 2 and tokens.owner(second) is None
    assert not TokenList(tmp_path / "tokens").entries()


def test_another_process_is_heard(tmp_path: Path) -> None:
    tokens, other = TokenList(tmp_path / "tokens"), TokenList(tmp_path / "tokens")
    token = other.issue("alice")
    assert tokens.refresh() and tokens.owner(token) == "alice" and not tokens.refresh()


@pytest.mark.parametrize("line", ["isk-abc alice", "sha256:abc alice", f"sha256:{'0' * 64}", f"sha256:{'0' * 64} a b"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "tokens").write_text(f"# a comment\n{line}\n")
    with pytest.raises(ProtocolError, match=r"line 2 of .*tokens is no entry; write: SHA256 PRINCIPAL"):
        TokenList(tmp_path / "tokens")


def test_a_bad_owner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="is no name"):
        TokenList(tmp_path / "tokens").issue("no name")
    assert not (tmp_path / "tokens").exists()


def test_a_lent_key_is_let_in_until_it_is_given_back(tmp_path: Path) -> None:
    allowed, key = AllowList(tmp_path / "allowed"), new_pair().public
    allowed.allow(new_pair().public, "bob")
    assert allowed.principal(key) is None
    allowed.refresh()
    allowed.lend(key, "alice")
    assert allowed.principal(key) == "alice" and allowed.principals() == {"alice", "bob"}
    assert allowed.refresh() and not allowed.refresh()
    assert key not in (tmp_path / "allowed").read_text()
    allowed.give_back("alice")
    assert allowed.principal(key) is None and allowed.principals() == {"bob"} and allowed.refresh()
    with pytest.raises(ProtocolError):
        allowed.lend("short", "alice")
