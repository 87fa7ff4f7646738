"""`bundle.json` of an ONNX model that was cut: what goes in, what travels, what comes out; read strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from isthmus.protocol.arrays import DTYPES, MAX_ARRAYS, MAX_DIMS
from isthmus.protocol.errors import BundleError
from isthmus.protocol.features import is_codec
from isthmus.split.manifest import FORMAT_VERSION, FileEntry, check_files, check_model_name
from isthmus.split.pictures import Preprocess

DEVICE, CLOUD = "device/model.onnx", "cloud/model.onnx"
EDGE = "edge"  # the folder of a bundle by which an edge server shares the cloud's part with a cloud behind it
STAGE = "device/stage-{}.onnx"  # of the device, behind its first exit: 2, 3, ...
MOST_EXITS = 3
_AGAIN = "split the model again"


class Named(msgspec.Struct, frozen=True):
    """A tensor.

    Attributes:
        dtype: as numpy names it.
        shape: None for a dimension that is open.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def text(self) -> str:
        """Its type and sizes, for people."""
        return f"{self.dtype} [{', '.join('any' if size is None else str(size) for size in self.shape)}]"

    def fits(self, dtype: str, shape: Sequence[int]) -> bool:
        """Whether an array of that type and shape is one."""
        same = len(shape) == len(self.shape)
        return self.dtype == dtype and same and all(a in (None, b) for a, b in zip(self.shape, shape, strict=False))

    def check(self, what: str) -> None:
        """Raises a BundleError if it can be no tensor."""
        if not 0 < len(self.name) <= 1000 or self.dtype not in DTYPES or len(self.shape) > MAX_DIMS:
            raise BundleError(f"bundle.json has the {what} {self.name[:80]!r} of type {self.dtype[:40]!r}", _AGAIN)
        if any(size is not None and not 0 <= size < 2**31 for size in self.shape):
            raise BundleError(f"bundle.json has the {what} {self.name[:80]!r} with the shape {self.shape}", _AGAIN)


class GraphExit(msgspec.Struct, frozen=True):
    """An output at which the device ends where that is sure of itself.

    Attributes:
        output: its name.
        confidence: the probability of what is likeliest from which the answer is final, in every row of it.
        probabilities: whether the output has them; else their logarithms, up to a constant.
    """

    output: str
    confidence: float
    probabilities: bool = False


class GraphManifest(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        name: for people; the identity is `model_id`.
        model_id: BLAKE2b-128 over the hashes of all files and the names of all tensors, in hex.
        model: the sha256 of the model that was cut, and of its weights.
        inputs, outputs: of the whole model.
        crossing: what travels, in the order in which it does; the cloud's part is given it.
        kept: outputs that the device's part makes.
        batches: whether the cloud's part, given rows of several requests, gives the rows of each.
        codec: in which the device sends what travels, as `protocol.features` has it.
        exits: of the device, in the order in which they are reached.
        preprocess: what makes an input of a picture's file; None where nothing is known of that.
        files: every file but bundle.json, by its name within the bundle.
    """

    name: str
    model_id: str
    model: str
    inputs: tuple[Named, ...]
    outputs: tuple[Named, ...]
    crossing: tuple[Named, ...]
    kept: tuple[str, ...]
    files: dict[str, FileEntry]
    kind: Literal["graph"] = "graph"
    format_version: int = FORMAT_VERSION
    batches: bool = False
    codec: str = ""
    exits: tuple[GraphExit, ...] = ()
    preprocess: Preprocess | None = None

    @classmethod
    def parse(cls, data: bytes) -> GraphManifest:
        """From the bytes of a `bundle.json`.

        Raises:
            BundleError: another version or kind, a field that cannot be, or a model_id that does not follow.
        """
        try:
            found = msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            if "'decoder'" in str(error) and "$.kind" in str(error):
                remedy = "open it with isthmus.edge.Device"
                raise BundleError("the bundle is of a language model", remedy) from error
            raise BundleError(f"bundle.json cannot be read: {error}", _AGAIN) from error
        found.check()
        return found

    def check(self) -> None:
        """Raises a BundleError if it is of another version, or something in it cannot be."""
        if self.format_version != FORMAT_VERSION:
            problem = f"bundle.json has format_version {self.format_version}, not {FORMAT_VERSION}"
            raise BundleError(problem, "install a newer isthmus" if self.format_version > FORMAT_VERSION else _AGAIN)
        check_model_name(self.name)
        for what, tensors in (("input", self.inputs), ("output", self.outputs), ("crossing", self.crossing)):
            if not tensors or len(tensors) > MAX_ARRAYS or len({one.name for one in tensors}) < len(tensors):
                raise BundleError(f"bundle.json has {len(tensors)} {what} tensors, or two of one name", _AGAIN)
            for one in tensors:
                one.check(what)
        if not set(self.kept) < {one.name for one in self.outputs}:
            raise BundleError("bundle.json keeps outputs that the model has not, or all of them", _AGAIN)
        if not is_codec(self.codec):
            raise BundleError(f"bundle.json sends in the codec {self.codec[:40]!r}", _AGAIN)
        if self.preprocess is not None and self.preprocess.input not in {one.name for one in self.inputs}:
            raise BundleError(f"bundle.json makes the input {self.preprocess.input[:80]!r} of pictures", _AGAIN)
        if len(self.exits) > MOST_EXITS or len({one.output for one in self.exits}) < len(self.exits):
            raise BundleError(f"bundle.json has {len(self.exits)} exits, or two at one output", _AGAIN)
        for exit in self.exits:
            if exit.output not in self.kept or not 0.0 < exit.confidence <= 1.0:
                problem = f"bundle.json has an exit at {exit.output[:80]!r}, sure from {exit.confidence:g} on"
                raise BundleError(problem, _AGAIN)
        check_files(self.files)
        handed_over = {*self.kept, *(one.name for one in self.crossing)} <= {one.name for one in self.inputs}
        for name in (CLOUD,) if handed_over else (DEVICE, CLOUD):
            if name not in self.files:
                raise BundleError(f"bundle.json lists no {name}", _AGAIN)
        pieces = {name for name in self.files if name.startswith("device/") and name.endswith(".onnx")}
        if unknown := pieces - {name for name, _ in self.stages}:
            raise BundleError(f"bundle.json has {min(unknown)[:80]}, and no exit before it", _AGAIN)
        if self.model_id != graph_id(self.files, (self.inputs, self.outputs, self.crossing)):
            raise BundleError(f"model_id {self.model_id[:64]!r} does not follow from the bundle's files", _AGAIN)

    @property
    def stages(self) -> list[tuple[str, GraphExit | None]]:
        """The device's part: files that run one after the other, "" for nothing to do, each with the exit behind it."""
        names = [DEVICE, *(STAGE.format(at + 2) for at in range(len(self.exits)))]
        exits: tuple[GraphExit | None, ...] = (*self.exits, None)
        return [(name if name in self.files else "", one) for name, one in zip(names, exits, strict=True)]

    def encode(self) -> bytes:
        """The bytes of a `bundle.json`."""
        return json.dumps(msgspec.to_builtins(self), indent=1).encode() + b"\n"


def part_files(part: str, files: Iterable[str]) -> list[str]:
    """Of the names of a bundle's files, a part's: the model, and weights beside it."""
    return sorted(name for name in files if name.startswith(part.removesuffix("onnx")))


def graph_id(files: Mapping[str, FileEntry], tensors: tuple[tuple[Named, ...], ...]) -> str:
    """BLAKE2b-128 over the hashes of all files and the tensors, in hex; no path or label enters."""
    hashes = {name: entry.sha256 for name, entry in sorted(files.items())}
    canonical = json.dumps([hashes, msgspec.to_builtins(tensors)], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
