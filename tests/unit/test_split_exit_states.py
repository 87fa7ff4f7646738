"""States in a work folder: whose they are, whether they are whole, and what happens where there is no room."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.engine.part import Rows, StepResult
from isthmus.protocol.errors import ModelError
from isthmus.split.exit_states import Sample, States

WIDTH, LAYER = 8, 2
NAMES = ["before-2.npy", "choices.npy", "last.npy"]


class ToyPart:
    """States and choices are the tokens themselves."""

    end = 4

    def open(self) -> ToyPart:
        return self

    def step(self, rows: Rows) -> StepResult:
        (span,) = rows.spans
        if span.hidden_in is None:
            tokens = np.asarray(span.tokens, np.float32)
            hidden = np.repeat(tokens[:, None], WIDTH, axis=1)
        else:
            hidden = span.hidden_in
        return StepResult(hidden[:, 0].astype(int).tolist(), hidden, np.zeros((0, 0), np.float32))

    def close(self) -> None:
        pass


def samples(first: int, count: int = 5) -> list[Sample]:
    return [Sample([first + i] * (9 + i)) for i in range(count)]


def opened(folder: Path, given: list[Sample]) -> States:
    return States(folder, given, [LAYER], WIDTH, "aa")


def collected(folder: Path, given: list[Sample], killed_after: int = 0) -> States:
    def tell(done: int, _: int) -> None:
        if done == killed_after:
            raise KeyboardInterrupt

    states = opened(folder, given)
    states.collect(ToyPart(), tell)  # type: ignore[arg-type]
    return states


def right(states: States) -> bool:
    """Whether all states are those of the samples."""
    return states.done == len(states.samples) and all(
        (states.before(LAYER, i) == sample.tokens[0]).all()
        and (states.last(i) == sample.tokens[0]).all()
        and (states.choices(i) == sample.tokens[0]).all()
        for i, sample in enumerate(states.samples)
    )


def test_who_is_killed_leaves_nothing_that_passes_for_anothers(tmp_path: Path) -> None:
    assert right(collected(tmp_path, samples(10)))
    assert right(opened(tmp_path, samples(10)))
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path, samples(90), killed_after=3)
    again = opened(tmp_path, samples(10))
    assert again.done == 0
    again.collect(ToyPart())  # type: ignore[arg-type]
    assert right(again)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["lost", "torn", "longer", "empty", "zeros", "other"])
def test_a_file_that_is_lost_or_not_whole_is_made_anew(name: str, damage: str, tmp_path: Path) -> None:
    collected(tmp_path, samples(10))
    data = (tmp_path / name).read_bytes()
    if damage == "other":
        np.save(tmp_path / name, np.zeros((3, WIDTH), np.float16))
    else:
        made = {"torn": data[:-1], "longer": data + b"x", "empty": b"", "zeros": bytes(len(data))}
        (tmp_path / name).unlink() if damage == "lost" else (tmp_path / name).write_bytes(made[damage])
    again = opened(tmp_path, samples(10))
    assert again.done == 0 and not (tmp_path / "states.json").exists()
    again.collect(ToyPart())  # type: ignore[arg-type]
    assert right(opened(tmp_path, samples(10)))


def test_more_than_there_is_cannot_be_done(tmp_path: Path) -> None:
    key = collected(tmp_path, samples(10)).key
    (tmp_path / "states.json").write_text(f'{{"key": "{key}", "done": 6}}')
    assert opened(tmp_path, samples(10)).done == 0


def test_all_pages_are_reserved(tmp_path: Path) -> None:
    many = [Sample([1] * 4000)] * 30
    opened(tmp_path, many)
    for name in NAMES:
        found = (tmp_path / name).stat()
        assert found.st_blocks * 512 >= found.st_size > 400_000


def test_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    collected(tmp_path, samples(10))
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ModelError, match=r"no room in .* for 0\.0 MB of states: No space left on device; make room"):
        opened(tmp_path, samples(90))
    assert list(tmp_path.iterdir()) == []  # nor is room taken by what cannot be used


def test_a_file_system_that_cannot_reserve_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", cannot)
    assert right(collected(tmp_path, samples(10)))
    monkeypatch.delattr("os.posix_fallocate")
    assert right(collected(tmp_path, samples(90)))


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_too_large_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no room in .* MB of states: File too large"):
        opened(tmp_path, [Sample([1] * 4000)] * 30)
