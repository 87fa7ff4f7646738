"""ONNX files of which nothing is known: read without the weights that lie in files beside them."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError

from isthmus.protocol.errors import PlanError
from isthmus.split.files import digest_of, open_regular

MOST_BYTES = 2**31 - 1  # of a protobuf message; weights beside the file may be larger
MAX_DEPTH = 32  # of subgraphs in subgraphs
_AGAIN = "export the model again"
_NIBBLES = (onnx.TensorProto.UINT4, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1)


@dataclass(frozen=True, slots=True)
class External:
    """Where a weight lies that is not in the model's own file.

    Attributes:
        file: beside the model.
        offset, length: of its bytes there.
    """

    file: Path
    offset: int
    length: int


def read_model(path: Path) -> onnx.ModelProto:
    """A model; the values of weights beside it are left where they are.

    Raises:
        PlanError: it is none, is damaged, or its weights are absent, too short, or not beside it.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise PlanError(f"{path} is larger than an ONNX file can be", "export it with its weights in a file beside it")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise PlanError(f"{path} is no ONNX file, or a damaged one", _AGAIN) from error
    if not model.ir_version or not model.opset_import or not model.graph.node:
        raise PlanError(f"{path} is no ONNX file, or one without any node", "name an ONNX model")
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external(tensor, path.parent)
    return model


def digest(path: Path, model: onnx.ModelProto) -> str:
    """The sha256 of a model's file and of the weights beside it: 64 hex digits."""
    return digest_of(path, *beside(path, model))


def beside(path: Path, model: onnx.ModelProto) -> list[Path]:
    """The files that a model's weights lie in beside its own.

    Raises:
        PlanError: as in `external`.
    """
    kept = (one for one in tensors_of(model) if one.data_location == onnx.TensorProto.EXTERNAL)
    return sorted({external(one, path.parent).file for one in kept})


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constant tensors: initializers and attributes, those of subgraphs and functions included."""
    yield from _in_graph(model.graph, 0)
    for function in model.functions:
        yield from _in_nodes(function.node, 0)


def tensors_in(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Constant tensors that a node carries itself: in its attributes and its bodies."""
    yield from _in_nodes(iter((node,)), 0)


def _in_graph(graph: onnx.GraphProto, depth: int) -> Iterator[onnx.TensorProto]:
    if depth > MAX_DEPTH:
        raise PlanError(f"subgraphs lie more than {MAX_DEPTH} deep in each other", "simplify the model")
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node, depth)


def _in_nodes(nodes: Iterator[onnx.NodeProto], depth: int) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                if graph.node or graph.initializer:
                    yield from _in_graph(graph, depth + 1)


def external(tensor: onnx.TensorProto, folder: Path) -> External:
    """Where the values of a tensor lie that are not in the model's file.

    Raises:
        PlanError: not in a regular file beside the model, or not all of them.
    """
    told = {entry.key: entry.value for entry in tensor.external_data}
    name, called = told.get("location", ""), f"weight {tensor.name!r}"
    inside = PurePosixPath(name)
    away = inside.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in inside.parts or "\\" in name
    if not inside.parts or away or "\0" in name:
        raise PlanError(f"{called} lies in {name!r}, which is not beside the model", _AGAIN)
    file = folder
    for part in inside.parts:
        file /= part
        try:
            kind = file.lstat().st_mode
        except OSError as error:
            raise PlanError(f"{called} lies in {name!r}, which is not there", "put it beside the model") from error
        if stat.S_ISLNK(kind):
            raise PlanError(f"{called} lies in {name!r}, which is a link", "put the file itself beside the model")
    if not stat.S_ISREG(kind):
        raise PlanError(f"{called} lies in {name!r}, which is no file", _AGAIN)
    size, needed = file.stat().st_size, tensor_bytes(tensor)
    try:
        offset = int(told.get("offset", 0))
        length = int(told.get("length", needed))
    except ValueError as error:
        raise PlanError(f"{called} lies nowhere: its offset or length is no number", _AGAIN) from error
    if offset < 0 or length != needed:
        raise PlanError(f"{called} has {length} bytes from {offset} on, but its shape needs {needed}", _AGAIN)
    if offset + length > size:
        raise PlanError(
            f"{name} ends after {size} bytes, but {called} lies at {offset} to {offset + length}",
            "the file is truncated: copy it again",
        )
    return External(file, offset, length)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """What the values of a tensor take.

    Raises:
        PlanError: its type or a dimension is none.
    """
    if any(dimension < 0 for dimension in tensor.dims):
        raise PlanError(f"weight {tensor.name!r} has a negative dimension", _AGAIN)
    count: int = math.prod(tensor.dims)
    if tensor.data_type in _NIBBLES:
        return -(-count // 2)
    try:
        size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError as error:
        raise PlanError(f"weight {tensor.name!r} has the unknown type {tensor.data_type}", _AGAIN) from error
    return count * size
