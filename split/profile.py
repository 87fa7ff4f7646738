"""A device profile: what a network's nodes take on one machine, as a file that may be copied from there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from isthmus.protocol.errors import PlanError
from isthmus.split.files import read_regular, write_whole

VERSION = 1
MOST_THREADS = 4096
_AGAIN = "measure it again: isthmus profile"
Kept = TypeVar("Kept", bound=msgspec.Struct)
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class TensorSize(msgspec.Struct, frozen=True, array_like=True):
    """A tensor as it was seen.

    Attributes:
        dtype: as numpy names it.
        bytes: of its values.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Profile(msgspec.Struct, frozen=True):
    """See the module; times are milliseconds.

    Attributes:
        model: the sha256 of the model and its weights.
        runtime, machine, processor: what ran it, on what.
        threads: that ran it.
        whole_ms: the median of warm runs; `first_ms` is the first run's.
        nodes_ms, ops, weights: time, operator and bytes of weights of each node, in the graph's order. The times are
            those of fused nodes, shared out, and come to `whole_ms` together; a weight that several nodes use counts
            for each.
        inputs: by name, as they were given.
        tensors: by name, all that nodes hand on and give.
    """

    model: str
    name: str
    runtime: str
    machine: str
    processor: str
    threads: int
    whole_ms: float
    first_ms: float
    nodes_ms: tuple[float, ...]
    ops: tuple[str, ...]
    weights: tuple[int, ...]
    inputs: dict[str, TensorSize]
    tensors: dict[str, TensorSize]
    format: Literal["isthmus-profile"] = "isthmus-profile"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise PlanError(f"the profile has version {self.version}, this isthmus reads {VERSION}", _AGAIN)
        if not _HEX.match(self.model) or not self.nodes_ms:
            raise PlanError("the profile is of no model", _AGAIN)
        if len({len(self.nodes_ms), len(self.ops), len(self.weights)}) > 1:
            raise PlanError("the profile does not say the same number of nodes everywhere", _AGAIN)
        times = (*self.nodes_ms, self.whole_ms, self.first_ms)
        if not all(0.0 <= ms < float("inf") for ms in times) or not self.whole_ms:
            raise PlanError("the profile has a time that is none", _AGAIN)
        if not 1 <= self.threads <= MOST_THREADS:
            raise PlanError(f"the profile is of {self.threads} threads", _AGAIN)
        sizes = (*self.inputs.values(), *self.tensors.values())
        if any(one.bytes < 0 or any(dim < 0 for dim in one.shape) for one in sizes) or min(self.weights) < 0:
            raise PlanError("the profile has a size that is none", _AGAIN)

    @classmethod
    def of(cls, told: Mapping[str, Any], processor: str, machine: str) -> Profile:
        """What `onnx_measure.measure` found, and where."""
        return msgspec.convert({**told, "processor": processor, "machine": machine}, cls)

    def save(self, path: Path) -> None:
        """Writes it, as JSON for people to read as well."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))

    def check(self, model: str, nodes: int, whose: str = "") -> None:
        """Holds it against a model.

        Args:
            whose: the machine, for the error message.

        Raises:
            PlanError: it is another model's.
        """
        if (self.model, len(self.nodes_ms)) != (model, nodes):
            called = f"the {whose}'s profile" if whose else "the profile"
            raise PlanError(f"{called} is of {self.name}, or another version of this model", _AGAIN)


def load_profile(path: Path) -> Profile:
    """A profile from a file.

    Raises:
        PlanError: it cannot be read, holds none, or one of another version.
    """
    return load(path, Profile, "device profile", _AGAIN)


def load(path: Path, kind: type[Kept], called: str, again: str) -> Kept:
    """What was kept in a JSON file, checked by its type.

    Args:
        called, again: what it is, and how to make another, for error messages.

    Raises:
        PlanError: the file cannot be read, holds something else, or the type refuses it.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}", f"name a {called}") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise PlanError(f"{path} is no {called}: it is nested too deep", again) from error
    except msgspec.DecodeError as error:
        if isinstance(error.__cause__, PlanError):
            raise PlanError(f"{path}: {error.__cause__.problem}", error.__cause__.remedy) from error
        other, own = _format(data), next(one.default for one in msgspec.structs.fields(kind) if one.name == "format")
        if other.startswith("isthmus-") and other != own:
            raise PlanError(f"{path} is no {called}, but an {other}", again) from error
        raise PlanError(f"{path} is no {called}: {error}", again) from error


class _Said(msgspec.Struct):
    format: str = ""


def _format(data: bytes) -> str:
    """What a file says that it is."""
    try:
        return msgspec.json.decode(data, type=_Said).format
    except (msgspec.DecodeError, RecursionError):
        return ""
