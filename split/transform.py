"""Transform coding of what travels: a Karhunen-Loeve transform over channels, after which one step is right for all.

Channels of a network's features repeat each other, and so do neighbouring positions of early ones. Their principal
components do not, so that each may be rounded and entropy-coded for itself; an error of the same size in any of them is
an error of that size in the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError

MOST = 768  # components: the basis of so many takes a megabyte
MOST_VALUES = 1 << 24  # that components are found with
PATCHES = (1, 2, 4)
SEGMENTS = 64  # of components, that groups are made of
LEVELS = 256
LEAST_STEP = 1e-20
ARRAY_BYTES = 50.0  # that a group takes beside its values: its shape in the message, its coder's states
SYMBOL_BYTES = 1.3  # of a level's frequency
_F16, _F32 = np.dtype("<f2"), np.dtype("<f4")
_AGAIN = "plan again: isthmus plan"
Features = NDArray[np.float32]


class Transform(msgspec.Struct, frozen=True, dict=True):
    """An invertible linear map over the channels of a tensor, each component in units of the step that it is coded in.

    Attributes:
        tensor: its name.
        axis: of its channels.
        mean: of the channels, [channels] f32.
        step: of all components.
        basis: whose columns are the components, [channels * patch * patch, components] f16.
        groups: how many components, the widest first, are coded together.
        patch: a component is made of so many rows and columns of neighbouring positions.
    """

    tensor: str
    axis: int
    mean: bytes
    step: float
    basis: bytes
    groups: tuple[int, ...]
    patch: int = 1

    def check(self) -> None:
        """Raises a PlanError if it is none."""
        count, patched = self.components, self.patch in PATCHES and (self.patch == 1 or self.axis == 1)
        sized = len(self.mean) == self.channels * _F32.itemsize and len(self.basis) == count * count * _F16.itemsize
        whole = 0 < count <= MOST and min(self.groups) > 0 and self.channels * max(1, self.patch) ** 2 == count
        if not (patched and whole and sized and 0 < self.axis < 4):
            raise PlanError(f"the transform of {self.tensor[:60]!r} has sizes that cannot be", _AGAIN)
        if not (LEAST_STEP <= self.step <= 1 / LEAST_STEP and np.isfinite(self._basis).all()):
            raise PlanError(f"the transform of {self.tensor[:60]!r} has values that cannot be", _AGAIN)
        apart = np.abs(self._basis.T @ self._basis - np.eye(count)).max() if count else 0.0
        if not np.isfinite(self.mean_of_channels).all() or apart > 0.1:
            raise PlanError(f"the transform of {self.tensor[:60]!r} cannot be undone", _AGAIN)

    @property
    def components(self) -> int:
        """How many."""
        return sum(self.groups)

    @property
    def channels(self) -> int:
        """How many; of a patch there are as many components as it has values."""
        return self.components // (max(1, self.patch) ** 2)

    @property
    def mean_of_channels(self) -> Features:
        """[channels] f32"""
        return np.frombuffer(self.mean, _F32)

    @property
    def offset(self) -> Features:
        """The mean of each value of a patch, [components] f32."""
        return np.repeat(self.mean_of_channels, self.patch**2)

    @cached_property
    def forward(self) -> Features:
        """From a patch without its mean to components, [components, channels * patch * patch] f32."""
        return np.ascontiguousarray(self._basis.T / self.step, np.float32)

    @cached_property
    def backward(self) -> Features:
        """And back, [channels * patch * patch, components] f32."""
        return np.linalg.inv(self._basis.T / self.step).astype(np.float32)

    @property
    def names(self) -> list[str]:
        """Of the tensors that travel, one for each group."""
        return [f"{self.tensor}/unit{at}" for at in range(len(self.groups))]

    def split(self, tensor: Features) -> list[Features]:
        """What travels of a tensor."""
        found = self.forward @ (_flat(tensor, self.axis, self.patch) - self.offset[:, None])
        edges = np.cumsum(self.groups)[:-1]
        like = self.dims(tensor.shape, 0)
        return [_shaped(part, self.axis, 1, like) for part in np.split(found, edges)]

    def joined(self, parts: Sequence[Features]) -> Features:
        """The tensor of what came."""
        flat = np.concatenate([_flat(part, self.axis, 1) for part in parts])
        return _shaped(self.backward @ flat + self.offset[:, None], self.axis, self.patch, parts[0].shape)

    def dims(self, dims: Sequence[int | None], group: int) -> tuple[int | None, ...]:
        """The sizes of what travels for a group, by those of the tensor."""
        after = (size if size is None or self.patch == 1 else size // self.patch for size in dims[self.axis + 1 :])
        return *dims[: self.axis], self.groups[group], *after

    @cached_property
    def _basis(self) -> NDArray[np.float64]:
        return np.frombuffer(self.basis, _F16).reshape(self.components, -1).astype(np.float64)


class Components:
    """The principal components of a tensor's channels, on samples.

    Args:
        samples: [.., channels, ..] f32, finite, of the same channels.
        axis: of the channels.
        patch: see `Transform`; rows and columns of the samples are multiples of it.
        segments: that groups are made of, at most.
    """

    def __init__(
        self, tensor: str, axis: int, samples: Sequence[Features], patch: int = 1, segments: int = SEGMENTS
    ) -> None:
        self._tensor, self._axis, self._patch, self._segments = tensor, axis, patch, segments
        flat = np.concatenate([_flat(one, axis, patch) for one in samples], axis=1)
        self._positions = flat.shape[1] / len(samples)  # of a sample
        mean = flat.mean(axis=1, dtype=np.float64).reshape(-1, patch**2).mean(axis=1)
        self._mean = mean.astype(np.float32)
        chosen = np.random.default_rng(0).permutation(flat.shape[1])[: MOST_VALUES // len(flat)]
        centred = flat[:, np.sort(chosen)] - np.repeat(self._mean, patch**2)[:, None]
        spreads, basis = np.linalg.eigh((centred @ centred.T).astype(np.float64) / centred.shape[1])
        self._basis = np.ascontiguousarray(basis[:, ::-1]).astype(_F16)
        self.spread = math.sqrt(max(0.0, float(spreads.mean())))  # root mean square over channels
        self._found = self._basis.T.astype(np.float32) @ centred

    def coded(self, step: float) -> Transform:
        """With a step, components in those groups that make the fewest bytes."""
        codes = np.clip(np.rint(self._found / np.float32(step)), 1 - LEVELS / 2, LEVELS / 2).astype(np.int64)
        groups, mean, basis = self._groups(codes + (LEVELS // 2 - 1)), self._mean.tobytes(), self._basis.tobytes()
        return Transform(self._tensor, self._axis, mean, step, basis, groups, self._patch)

    def _groups(self, codes: NDArray[np.int64]) -> tuple[int, ...]:
        """Neighbours are put together as long as that saves bytes."""
        count = len(codes)
        edges = np.unique(np.linspace(0, count, min(self._segments, count) + 1).round().astype(int))
        sizes = np.diff(edges).tolist()
        bins = [np.bincount(codes[a:b].ravel(), minlength=LEVELS) for a, b in pairwise(edges)]
        scale = self._positions / codes.shape[1]
        costs = [_cost(one * scale) for one in bins]
        joint = [_cost((a + b) * scale) for a, b in pairwise(bins)]
        while joint:
            gains = [costs[at] + costs[at + 1] - both for at, both in enumerate(joint)]
            at = int(np.argmax(gains))
            if gains[at] <= 0.0:
                break
            sizes[at : at + 2] = [sizes[at] + sizes[at + 1]]
            bins[at : at + 2] = [bins[at] + bins[at + 1]]
            costs[at : at + 2] = [joint[at]]
            del joint[at]
            for side in (at - 1, at):
                if 0 <= side < len(joint):
                    joint[side] = _cost((bins[side] + bins[side + 1]) * scale)
        return tuple(sizes)


def axis_of(tensor: NDArray[np.generic]) -> int | None:
    """Which axis of what travels has its channels; None where it has none, or they are too many or too few."""
    axis = {4: 1, 3: 2}.get(tensor.ndim)
    if tensor.dtype != np.float32 or axis is None or not 1 < tensor.shape[axis] <= MOST:
        return None
    return axis


def patches_of(dims: Sequence[int]) -> list[int]:
    """Sizes of patches that a tensor can be made of, by its own sizes."""
    if len(dims) != 4 or not all(dims):
        return [1]
    channels, rows, columns = dims[1:]
    return [one for one in PATCHES if rows % one == columns % one == 0 and channels * one * one <= MOST]


def _flat(tensor: Features, axis: int, patch: int) -> Features:
    """[channels * patch * patch, positions]"""
    if patch == 1:
        return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    count, channels, rows, columns = tensor.shape
    cells = tensor.reshape(count, channels, rows // patch, patch, columns // patch, patch)
    return cells.transpose(1, 3, 5, 0, 2, 4).reshape(channels * patch * patch, -1)


def _shaped(flat: Features, axis: int, patch: int, like: Sequence[int | None]) -> Features:
    """The tensor of which `_flat` would be this.

    Args:
        like: sizes of what has as many positions; that of the channels does not count.
    """
    if patch == 1:
        sizes = [size or 0 for at, size in enumerate(like) if at != axis]
        return np.ascontiguousarray(np.moveaxis(flat.reshape(len(flat), *sizes), 0, axis), np.float32)
    count, rows, columns = like[0] or 0, like[2] or 0, like[3] or 0
    cells = flat.reshape(-1, patch, patch, count, rows, columns).transpose(3, 0, 4, 1, 5, 2)
    return np.ascontiguousarray(cells, np.float32).reshape(count, -1, rows * patch, columns * patch)


def _cost(counts: NDArray[np.float64]) -> float:
    """Bytes of so many values of each level, with their table."""
    seen = counts[counts > 0]
    bits = float((seen * np.log2(seen.sum() / seen)).sum())
    return bits / 8 + ARRAY_BYTES + SYMBOL_BYTES * len(seen)
