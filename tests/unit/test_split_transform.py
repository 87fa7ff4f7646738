"""Transform coding: components that can be undone, in groups that make the fewest bytes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from isthmus.protocol.arrays import pack, unpack
from isthmus.protocol.errors import PlanError
from isthmus.split.transform import MOST, Components, Transform, axis_of, patches_of

CHANNELS = 12


def samples(shape: tuple[int, ...], axis: int, count: int = 5) -> list[np.ndarray]:
    """Channels that repeat three patterns, each with a little of its own."""
    chance = np.random.default_rng(1)
    mix = chance.standard_normal((CHANNELS, 3)).astype(np.float32)
    found = []
    for _ in range(count):
        positions = int(np.prod(shape)) // CHANNELS
        flat = mix @ (chance.standard_normal((3, positions)) * np.array([[9.0], [3.0], [1.0]])).astype(np.float32)
        flat += 0.05 * chance.standard_normal(flat.shape).astype(np.float32) + 2.0
        rest = [size for at, size in enumerate(shape) if at != axis]
        found.append(np.ascontiguousarray(np.moveaxis(flat.reshape(CHANNELS, *rest), 0, axis)))
    return found


def smooth(count: int = 4) -> list[np.ndarray]:
    """Channels in which neighbours are much alike."""
    chance = np.random.default_rng(2)
    coarse = chance.standard_normal((count, 1, CHANNELS, 6, 5)).astype(np.float32)
    fine = [one.repeat(4, axis=2).repeat(4, axis=3) for one in coarse]
    return [one + 0.1 * chance.standard_normal(one.shape).astype(np.float32) for one in fine]


GIVEN = [((1, CHANNELS, 9, 7), 1), ((2, 40, CHANNELS), 2)]


@pytest.mark.parametrize(
    ("shape", "axis", "patch"),
    [(*GIVEN[0], 1), (*GIVEN[1], 1), ((2, CHANNELS, 8, 4), 1, 2), ((1, CHANNELS, 8, 4), 1, 4)],
)
def test_what_was_split_is_joined_again(shape: tuple[int, ...], axis: int, patch: int) -> None:
    given = samples(shape, axis)
    found = Components("x", axis, given, patch).coded(0.2)
    assert found.channels * patch**2 == found.components and found.channels == CHANNELS
    found.check()
    for one in given:
        parts = found.split(one)
        assert [part.shape for part in parts] == [found.dims(one.shape, at) for at in range(len(parts))]
        assert all(part.flags.c_contiguous and part.dtype == np.float32 for part in parts)
        np.testing.assert_allclose(found.joined(parts), one, atol=1e-4)


@pytest.mark.parametrize(("shape", "axis"), GIVEN)
def test_rounded_components_are_half_a_step_off_at_most(shape: tuple[int, ...], axis: int) -> None:
    given, step = samples(shape, axis), 1.0
    found = Components("x", axis, given).coded(step)
    for one in given:
        shapes, data = pack(found.split(one), "unit")
        off = found.joined(unpack(shapes, data)) - one  # type: ignore[arg-type]
        assert np.sqrt(np.square(off).mean()) < step / np.sqrt(12) * 1.1


def test_the_first_components_are_the_widest_and_the_last_share_a_table() -> None:
    given = samples(*GIVEN[0])
    found = Components("x", 1, given).coded(0.2)
    parts = np.concatenate([part.reshape(part.shape[1], -1) for part in found.split(given[0])])
    spreads = parts.std(axis=1)
    assert (np.diff(spreads[:3]) < 0).all() and spreads[3:].max() < 0.5 < spreads[2]
    assert 1 <= len(found.groups) <= 4 and sum(found.groups) == CHANNELS


def test_patches_pay_where_neighbours_are_alike() -> None:
    given, step = smooth(), 0.2
    sent = []
    for patch in (1, 2, 4):
        one = Components("x", 1, given, patch).coded(step)
        shapes, data = pack(one.split(given[0]), "unit")
        off = one.joined(unpack(shapes, data)) - given[0]  # type: ignore[arg-type]
        assert np.sqrt(np.square(off).mean()) < step / np.sqrt(12) * 1.1
        sent.append(len(data))
    assert sent[1] < 0.8 * sent[0] and sent[2] < sent[1]


def test_groups_are_fewer_where_there_is_little_to_send() -> None:
    shape, axis = (1, CHANNELS, 3, 3), 1
    small = Components("x", axis, samples(shape, axis)).coded(0.2)
    large = Components("x", axis, samples((1, CHANNELS, 60, 60), axis)).coded(0.2)
    assert len(small.groups) < len(large.groups)


def test_it_survives_a_file() -> None:
    found = Components("x", 1, samples(*GIVEN[0])).coded(0.2)
    assert msgspec.convert(msgspec.to_builtins(found), Transform) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Transform) == found


@pytest.mark.parametrize(
    "change",
    [
        {"groups": (CHANNELS - 1,)},
        {"groups": (13,), "patch": 2, "mean": b"\0" * 12, "basis": b"\0" * (2 * 13 * 13)},
        {"step": 1e-300},
        {"step": 1e300},
        {"groups": (CHANNELS, 0)},
        {"groups": ()},
        {"groups": (MOST + 1,)},
        {"axis": 0},
        {"mean": b""},
        {"basis": b"\0" * (2 * CHANNELS * CHANNELS)},
        {"basis": b"\xff" * (2 * CHANNELS * CHANNELS)},
        {"mean": b"\xff" * (4 * CHANNELS)},
        {"step": 0.0},
        {"step": float("nan")},
        {"patch": 0},
        {"patch": 2},
        {"patch": 3},
    ],
)
def test_what_is_no_transform_is_refused(change: dict[str, object]) -> None:
    found = Components("x", 1, samples(*GIVEN[0])).coded(0.2)
    with pytest.raises(PlanError, match="the transform of 'x'"):
        msgspec.structs.replace(found, **change).check()


@pytest.mark.parametrize(
    ("shape", "dtype", "axis"),
    [
        ((1, 8, 4, 4), np.float32, 1),
        ((1, 40, 8), np.float32, 2),
        ((1, 8), np.float32, None),
        ((1, 1, 4, 4), np.float32, None),
        ((1, MOST + 1, 1, 1), np.float32, None),
        ((1, 8, 4, 4), np.float64, None),
        ((1, 8, 4, 4), np.int64, None),
    ],
)
def test_which_axis_has_the_channels(shape: tuple[int, ...], dtype: type, axis: int | None) -> None:
    assert axis_of(np.zeros(shape, dtype)) == axis


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((1, 8, 4, 4), [1, 2, 4]),
        ((1, 8, 6, 4), [1, 2]),
        ((1, 8, 7, 8), [1]),
        ((1, MOST // 4, 8, 8), [1, 2]),
        ((1, 40, 8), [1]),
        ((1, 8, 0, 4), [1]),
    ],
)
def test_which_patches_a_tensor_is_made_of(shape: tuple[int, ...], found: list[int]) -> None:
    assert patches_of(shape) == found


def test_constant_channels() -> None:
    found = Components("x", 1, [np.full((1, CHANNELS, 4, 4), 3.0, np.float32)]).coded(0.1)
    found.check()
    np.testing.assert_allclose(found.joined(found.split(np.full((1, CHANNELS, 4, 4), 3.0, np.float32))), 3.0, atol=1e-5)
