"""KV that goes to disk and comes back: bit for bit, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.spill import Slot, Spill
from isthmus.engine.part import KV_BLOCK
from isthmus.protocol import messages as m
from isthmus.protocol.errors import ServiceError
from tests.cloud_world import World, rows
from tests.fakes import FakePart, fake_text
from tests.unit.test_cloud_context import TEXT, context, names, told, world

SLOT = 32 * KV_BLOCK  # of the fake part


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


Made = Callable[..., Spill]


@pytest.fixture
def made() -> Iterator[Made]:
    """Makes what is closed after the test."""
    with ExitStack() as stack:

        def make(folder: Path, slots: int = 4, clock: Any = None) -> Spill:
            spill = Spill(folder, SLOT, slots * SLOT + 1, clock or Time())
            stack.callback(spill.close)
            return spill

        yield make


def block(number: int, size: int = SLOT) -> bytes:
    return np.random.default_rng(number).bytes(size)


def test_what_was_written_comes_back(made: Made, tmp_path: Path) -> None:
    spill = made(tmp_path / "new" / "folder")
    slots = [spill.put(block(i, SLOT - i)) for i in range(4)]
    assert spill.full and spill.put(block(9)) is None and spill.held_bytes == 4 * SLOT
    for i in (2, 0, 3, 1):
        assert spill.get(slots[i] or pytest.fail()) == block(i, SLOT - i)
    spill.give(slots[1] or pytest.fail())
    again = spill.put(block(7))
    assert again is not None and spill.get(again) == block(7) and spill.full
    assert (spill.written, spill.read, spill.damaged) == (5, 5, 0)


def test_nobody_else_sees_the_file_and_nothing_stays(made: Made, tmp_path: Path) -> None:
    spill = made(tmp_path)
    spill.put(block(1))
    assert not list(tmp_path.iterdir())
    assert os.fstat(spill._file.fileno()).st_mode & 0o077 == 0
    spill.close()
    assert not list(tmp_path.iterdir())


def test_damage_is_found(made: Made, tmp_path: Path) -> None:
    spill = made(tmp_path)
    first, second = spill.put(block(1)), spill.put(block(2))
    assert first is not None and second is not None
    os.pwrite(spill._file.fileno(), b"\0", SLOT // 2)
    assert spill.get(first) is None and spill.get(second) == block(2)
    os.ftruncate(spill._file.fileno(), SLOT + 3)  # torn
    assert spill.get(second) is None and spill.damaged == 2


def test_a_disk_that_fails_is_left_alone_for_a_while(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time()
    spill = made(tmp_path, clock=clock)
    write, tries = os.pwrite, list[int]()

    def full(file: int, data: Any, at: int) -> int:
        tries.append(at)
        if len(tries) == 1:
            return write(file, data[:10], at)  # a part, and no more
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert spill.put(block(1)) is None and spill.put(block(1)) is None
    assert len(tries) == 2
    monkeypatch.setattr(os, "pwrite", write)
    assert spill.put(block(1)) is None
    clock.now += 31.0
    slot = spill.put(block(1))
    assert slot is not None and slot.place == 0 and spill.get(slot) == block(1)


def test_a_place_that_cannot_be_had_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match=r"cannot write into .*file.*--spill"):
        made(tmp_path / "file")
    with pytest.raises(ServiceError, match="cannot write into /dev/null"):
        made(Path("/dev/null/x"))
    with pytest.raises(ServiceError, match="hold no block of KV; give --spill-mb 2 or more"):
        Spill(tmp_path, 1_500_000, 1_000_000, Time())


def spilling(made: Made, tmp_path: Path, tokens: int = 96, slots: int = 64) -> tuple[World, FakePart]:
    one, part = world(tokens=tokens)
    context(one).spill = made(tmp_path, slots)
    return one, part


def test_sessions_come_back_from_disk(made: Made, tmp_path: Path) -> None:
    one, part = spilling(made, tmp_path)
    texts = [[t + n for t in TEXT] for n in range(6)]
    for n, text in enumerate(texts):
        assert told(one, text, session=bytes([n]) * 16) == fake_text(text, 1)
    before = sum(part.steps)
    for n, text in enumerate(texts):
        assert told(one, text, session=bytes([n]) * 16, prefixes=names(text, 69)) == fake_text(text, 1)
    assert sum(part.steps) == before + 6 * 6  # of each the rows behind its last whole block
    spill = context(one).spill
    assert spill is not None and spill.read >= 20 and not spill.damaged


def test_a_full_disk_forgets_the_oldest(made: Made, tmp_path: Path) -> None:
    one, _ = spilling(made, tmp_path, slots=6)
    texts = [[t + n for t in TEXT] for n in range(4)]
    for n, text in enumerate(texts):
        told(one, text, session=bytes([n]) * 16)
    assert one.open(session=b"x" * 16, prefixes=names(texts[0], 69)).committed < 64
    assert one.open(session=b"y" * 16, prefixes=names(texts[2], 69)).committed == 64


def test_what_is_damaged_is_computed_again(made: Made, tmp_path: Path) -> None:
    one, _ = spilling(made, tmp_path)
    second = [t + 1 for t in TEXT]
    told(one, TEXT)
    told(one, second, session=b"2" * 16)
    spill = context(one).spill
    assert spill is not None and spill.written
    os.ftruncate(spill._file.fileno(), 0)
    assert told(one, TEXT, session=b"3" * 16, prefixes=names(TEXT, 69)) == fake_text(TEXT, 1)
    assert spill.damaged == 1
    told(one, second, session=b"4" * 16)
    assert told(one, TEXT, session=b"5" * 16, prefixes=names(TEXT, 69)) == fake_text(TEXT, 1)


def test_a_session_begins_with_what_there_is_room_for(made: Made, tmp_path: Path) -> None:
    one, part = spilling(made, tmp_path, tokens=96)
    told(one, TEXT)
    second = [t + 1 for t in TEXT]
    one.open(b"b", session=b"b" * 16)
    one.ask(rows(second, 70), route=b"b", turns=3)  # it is under way, and keeps its memory
    found = one.open(session=b"3" * 16, prefixes=names(TEXT, 69)).committed
    assert found == 16 and 0 <= part.free_tokens < KV_BLOCK
    one.ask(m.Close(1, 1), route=b"b")
    assert one.ask(rows(TEXT, 54), turns=4)[-1].tokens == fake_text(TEXT, 1)


def test_idle_sessions_give_way_to_one_that_comes_back(made: Made, tmp_path: Path) -> None:
    one, part = spilling(made, tmp_path, tokens=176)
    texts = [[t + n for t in TEXT] for n in range(4)]
    for n, text in enumerate(texts):
        one.open(session=bytes([n]) * 16, alias=n + 1)
        assert one.ask(rows(text, 70, alias=n + 1), turns=6)[-1].tokens == fake_text(text, 1)
        one.later(10.0)
    before = sum(part.steps)
    for n in (0, 1, 2, 3, 0):
        opened = one.open(session=bytes([n]) * 16, alias=n + 1, epoch=9, prefixes=names(texts[n], 69))
        again = rows(texts[n], 70 - min(opened.committed, 69), alias=n + 1, epoch=9)
        assert opened.committed >= 64 and one.ask(again, turns=4)[-1].tokens == fake_text(texts[n], 1)
        one.later(10.0)
    assert sum(part.steps) - before <= 5 * 6


@pytest.mark.parametrize("seed", range(6))
def test_slots_are_neither_lost_nor_given_twice(made: Made, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spill, held = made(tmp_path, 8), dict[int, tuple[Slot, bytes]]()
    for number in range(300):
        if held and (spill.full or rng.random() < 0.4):
            slot, data = held.pop(int(rng.choice(list(held))))
            assert spill.get(slot) == data
            spill.give(slot)
        else:
            data = block(number, int(rng.integers(1, SLOT + 1)))
            new = spill.put(data)
            assert new is not None and new.place not in held
            held[new.place] = new, data
        assert spill.held_bytes == SLOT * len(held)
