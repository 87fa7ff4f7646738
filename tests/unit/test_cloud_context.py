"""KV that sessions leave for others: what begins with it, what it costs, and who never sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.context import Context
from isthmus.cloud.models import serve_part
from isthmus.engine.part import KV_BLOCK, KvConfig, Rows, Want
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.chain import NAME_BYTES, Chain
from isthmus.protocol.errors import OutOfBlocks
from isthmus.protocol.keys import AllowList
from tests.cloud_world import ANNA, BERT, SESSION, World, code, rows
from tests.fakes import FakePart, fake_text

TEXT = [(7 * i) % 1000 for i in range(70)]
OTHER = b"o" * 16


def world(tokens: int = 4096, **settings: Any) -> tuple[World, FakePart]:
    kv = KvConfig(max_tokens=tokens)
    part = FakePart(kv=kv)
    return World(serve_part(part, "aa", "fake", kv=kv), **settings), part


def context(of: World) -> Context:
    (model,) = of.service.models.values()
    assert model.context is not None
    return model.context


def names(text: list[int], length: int | None = None) -> bytes:
    return Chain(text).names(len(text) if length is None else length)


def told(of: World, text: list[int], **fields: Any) -> list[int]:
    """What the model says after a text, in a session that is opened for it and closed again."""
    route, key = fields.pop("route", b"a"), fields.pop("key", "")
    opened = of.open(route, key, session=fields.pop("session", SESSION), **fields)
    assert isinstance(opened, m.Opened), opened
    assert opened.prefix_hash == Chain(text).at(opened.committed)
    ahead = rows(text, len(text) - opened.committed)
    result = of.ask(ahead, route=route, key=key, turns=9)[-1]
    of.ask(m.Close(1, 1), route=route, key=key)
    tokens: list[int] = result.tokens
    return tokens


def test_a_second_session_begins_where_the_first_ended() -> None:
    one, part = world()
    expected = told(one, TEXT)
    assert expected == fake_text(TEXT, 1) and sum(part.steps) == 70
    assert one.open(session=OTHER, prefixes=names(TEXT, 69)).committed == 64
    assert one.ask(rows(TEXT, 6), turns=2)[-1].tokens == expected
    assert sum(part.steps) == 76
    metrics = context(one)
    assert (metrics.asked_tokens, metrics.found_tokens) == (64, 64)


def test_what_differs_is_computed() -> None:
    one, part = world()
    told(one, TEXT)
    changed = [*TEXT[:40], 999, *TEXT[41:]]
    assert told(one, changed, session=OTHER, prefixes=names(changed, 69)) == fake_text(changed, 1)
    assert sum(part.steps) == 70 + 38  # two blocks are the same
    assert told(one, TEXT, session=b"3" * 16, prefixes=names(TEXT, 69)) == fake_text(TEXT, 1)
    assert sum(part.steps) == 70 + 38 + 6


def test_an_evicted_session_comes_back_from_what_is_kept() -> None:
    one, part = world(tokens=112)
    one.open()
    one.ask(rows(TEXT, 70), turns=2)
    one.open(b"b", session=OTHER)
    one.later(10.0)
    text = TEXT[::-1]
    assert one.ask(rows(text, 70), route=b"b", turns=4)[-1].tokens == fake_text(text, 1)
    before = sum(part.steps)
    committed = one.open(epoch=2, prefixes=names(TEXT, 69)).committed
    assert committed == 32  # the rest was taken for the other
    one.later(10.0)
    assert one.ask(rows(TEXT, 38, epoch=2), turns=4)[-1].tokens == fake_text(TEXT, 1)
    assert sum(part.steps) - before == 38


def test_memory_is_had_from_what_nobody_uses_the_oldest_end_first() -> None:
    one, part = world(tokens=160)
    told(one, TEXT)
    second = [t + 1 for t in TEXT]
    told(one, second, session=OTHER)
    assert part.free_tokens == 160 - 8 * KV_BLOCK and context(one).spare_tokens == 8 * KV_BLOCK
    third = [t + 2 for t in TEXT]
    assert told(one, third, session=b"3" * 16) == fake_text(third, 1)
    left = one.open(session=b"4" * 16, prefixes=names(TEXT, 69)).committed
    assert left == 16 and one.open(session=b"5" * 16, prefixes=names(second, 69)).committed == 64


def test_a_cloud_that_keeps_nothing_begins_anew() -> None:
    one, part = world(context_s=0)
    for number in range(2):
        told(one, TEXT, session=bytes([number]) * 16, prefixes=names(TEXT, 69))
    assert sum(part.steps) == 140 and part.free_tokens == 4096


def test_a_full_cloud_counts_what_nobody_uses_as_free() -> None:
    one, _ = world(tokens=80)
    told(one, TEXT)
    assert isinstance(one.open(session=OTHER, max_positions=80), m.Opened)
    assert code(one.open(session=b"3" * 16, alias=2, max_positions=96)) == m.Code.KV_FULL


def test_its_time_is_up_when_no_session_used_it_for_so_long() -> None:
    one, part = world(context_s=30.0)
    told(one, TEXT)
    one.open(session=OTHER, prefixes=names(TEXT[:32]))
    for _ in range(20):
        one.later(2.0)
    assert len(context(one)) == 2  # of the session that is open
    one.ask(m.Close(1, 1))
    one.later(20.0)
    one.later(1.0)
    assert len(context(one)) == 2
    for _ in range(20):
        one.later(2.0)
    assert not len(context(one)) and part.free_tokens == 4096


def allowed(tmp_path: Path, *entries: tuple[str, str]) -> AllowList:
    path = tmp_path / "allowed"
    path.write_text("".join(f"{key} {name}\n" for key, name in entries))
    path.chmod(0o600)
    return AllowList(path)


def test_owners_of_keys_do_not_see_each_others(tmp_path: Path) -> None:
    listed = allowed(tmp_path, (ANNA, "anna"), (BERT, "bert"))
    one, part = world(allowed=listed)
    told(one, TEXT, key=ANNA)
    assert one.open(b"b", BERT, session=OTHER, prefixes=names(TEXT)).committed == 0
    assert one.open(b"c", ANNA, session=b"3" * 16, prefixes=names(TEXT)).committed == 64
    (tmp_path / "allowed").write_text(f"{BERT} bert\n")
    one.later(5.0)
    assert not len(context(one)) and part.free_tokens == 4096  # nothing stays of who is let in no more


def test_what_is_pinned_is_everybodys_and_stays(tmp_path: Path) -> None:
    one, part = world(tokens=160, context_s=30.0, allowed=allowed(tmp_path, (ANNA, "anna"), (BERT, "bert")))
    assert context(one).pin(TEXT[:40]) == 32 and context(one).pin(TEXT[:40]) == 32
    assert part.free_tokens == 128 and context(one).spare_tokens == 0
    begun = sum(part.steps)
    for key, route in ((ANNA, b"a"), (BERT, b"b")):
        session = route * 16
        said = told(one, TEXT[:60], key=key, route=route, session=session, prefixes=names(TEXT, 59))
        assert said == fake_text(TEXT[:60], 1)
    assert sum(part.steps) - begun == 2 * 28  # the third block of each is its own
    for _ in range(30):
        one.later(3.0)
    assert len(context(one)) == 2
    (tmp_path / "allowed").write_text(f"{BERT} bert\n")
    one.later(5.0)
    assert one.open(b"c", BERT, session=b"c" * 16, prefixes=names(TEXT)).committed == 32


def test_what_is_pinned_is_not_promised_to_sessions() -> None:
    one, part = world(tokens=160)
    assert context(one).pin(TEXT) == 64
    assert isinstance(one.open(max_positions=96), m.Opened)
    assert code(one.open(alias=2, session=OTHER, max_positions=112)) == m.Code.KV_FULL
    with pytest.raises(OutOfBlocks):
        context(one).pin(list(range(200)))
    assert part.free_tokens == 96


def test_states_do_not_begin_with_what_is_pinned_as_tokens() -> None:
    one, _ = world()
    context(one).pin(TEXT)
    assert one.open(enter=2, source="native-1/f16", prefixes=names(TEXT)).committed == 0


def states(text: list[int], enter: int) -> Any:
    """What a device sends that computes the layers before."""
    part = FakePart(0, enter)
    return part.step(Rows().tokens(part.open(), 0, text, want=Want.HIDDEN, want_all=True)).hidden


def ask_states(of: World, text: list[int], at: int, codec: str, alias: int) -> Any:
    coded = tensors.encode(states(text, 2)[at:], codec)
    return of.ask(m.Rows(alias, 1, at, Chain(text[:at]).head, text[at:], coded), turns=3)[-1]


def test_states_are_shared_where_the_same_made_them() -> None:
    one, part = world()
    fields: dict[str, Any] = {"enter": 2, "source": "native-1/f16", "prefixes": names(TEXT, 69)}
    assert one.open(alias=1, **fields).committed == 0
    expected = ask_states(one, TEXT, 0, "f16", 1).tokens
    assert expected == fake_text(TEXT, 1)
    assert one.open(alias=2, session=OTHER, **fields).committed == 64
    assert ask_states(one, TEXT, 64, "f16", 2).tokens == expected and sum(part.steps) == 76
    changes: list[dict[str, Any]] = [{"source": "native-1/int8"}, {"enter": 3}, {"source": ""}, {"enter": 0}]
    for number, change in enumerate(changes):
        found = one.open(alias=3 + number, session=bytes([number]) * 16, **{**fields, **change})
        assert found.committed == 0, change


def test_states_that_are_not_what_was_said_are_kept_for_nobody() -> None:
    one, _ = world()
    fields: dict[str, Any] = {"enter": 2, "source": "native-1/f16", "prefixes": names(TEXT, 69)}
    one.open(alias=1, **fields)
    ask_states(one, TEXT, 0, "int8", 1)
    assert not len(context(one))
    assert one.open(alias=2, session=OTHER, **fields).committed == 0


def test_a_window_begins_with_no_more_than_it_sees() -> None:
    one, _ = world()
    told(one, TEXT)
    assert one.open(session=OTHER, window=40, prefixes=names(TEXT, 69)).committed == 32
    other = [t + 1 for t in TEXT]
    told(one, other, session=b"3" * 16, window=40)
    assert one.open(session=b"4" * 16, prefixes=names(other, 69)).committed == 32


def test_another_text_whose_hash_begins_alike_is_not_taken() -> None:
    one, _ = world()
    told(one, TEXT)
    kept = context(one)
    entry = next(entry for key, entry in kept._entries.items() if key[1] == names(TEXT)[8:16])
    entry.tokens = [1] * 16
    assert one.open(session=OTHER, prefixes=names(TEXT, 69)).committed == 16


def test_guesses_that_were_wrong_are_kept_for_nobody() -> None:
    one, _ = world()
    right = fake_text(TEXT, 40)
    one.open()
    one.ask(rows(TEXT, 70), turns=2)
    guesses = [*right[:8], *[999] * 18]
    draft = m.Draft(1, 1, 70, Chain(TEXT).head, guesses)
    verdict = one.ask(draft, turns=2)[-1]
    assert verdict.accepted == 8 and verdict.token == right[8]
    whole = TEXT + guesses
    assert one.open(session=OTHER, alias=2, prefixes=names(whole)).committed == 64
    assert one.open(session=b"3" * 16, alias=3, prefixes=names(TEXT + right[:10])).committed == 64


@pytest.mark.parametrize("garbage", [b"", b"x", b"12345678", bytes(NAME_BYTES * 100)])
def test_names_of_nothing_begin_nothing(garbage: bytes) -> None:
    one, _ = world()
    told(one, TEXT)
    opened = one.open(session=OTHER, prefixes=garbage)
    assert opened.committed == 0
    assert one.ask(rows(TEXT, 70), turns=2)[-1].tokens == fake_text(TEXT, 1)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_and_goes_answers_are_the_models_own(seed: int) -> None:
    """Sessions that open, go on, are cut back, close and are evicted, in a KV that is too small for all."""
    rng = np.random.default_rng(seed)
    one, part = world(tokens=320, context_s=40.0)
    stems = [rng.integers(0, 1000, 60).tolist() for _ in range(3)]
    for turn in range(60):
        stem = stems[int(rng.integers(3))]
        text = stem[: int(rng.integers(1, 61))] + rng.integers(0, 1000, int(rng.integers(0, 20))).tolist()
        alias = int(rng.integers(1, 4))
        opened = one.open(session=bytes([alias]) * 16, alias=alias, epoch=turn + 1, prefixes=names(text, len(text) - 1))
        if isinstance(opened, m.Fault):
            assert opened.code == m.Code.BUSY
        else:
            epoch, at = turn + 1, 0
            chain = Chain(text)
            if opened.committed < len(text) and opened.prefix_hash == chain.at(opened.committed):
                at = opened.committed
            elif opened.committed:
                epoch += 100
                assert one.ask(m.Truncate(alias, epoch, 0))[-1].committed == 0
            answers = one.ask(rows(text, len(text) - at, alias=alias, epoch=epoch), turns=8)
            if answers and isinstance(answers[-1], m.Result):
                assert answers[-1].tokens == fake_text(text, 1)
            if epoch > 100 or rng.random() < 0.4:
                one.ask(m.Close(alias, 2**31))
        one.later(float(rng.choice([0.1, 3.0, 6.0])))
        assert 0 <= part.free_tokens <= 320
        assert context(one).spare_tokens <= 320 - part.free_tokens
    for alias in (1, 2, 3):
        one.ask(m.Close(alias, 2**31))
    assert context(one).found_tokens > 0
    one.later(100.0)
    one.later(100.0)
    assert part.free_tokens == 320 and not len(context(one))
