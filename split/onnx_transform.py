"""Transforms of what travels, folded into the two parts of an ONNX model: the device's gives components, the cloud's
is given them, so that nothing else need know of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_graph import Halves
from isthmus.split.transform import Features, Transform

_AGAIN = "plan again: isthmus plan"


def transformed(halves: Halves, transforms: Sequence[Transform]) -> Halves:
    """The parts, with these transforms between them; the rest travels as it did.

    Raises:
        PlanError: a transform is of a tensor that the device does not make and send.
    """
    for one in transforms:
        halves = _with(halves, one)
    return halves


def undoing(cloud: onnx.ModelProto, transforms: Sequence[Transform]) -> onnx.ModelProto:
    """The cloud's part as far as the tensors that were transformed, which it gives."""
    found = onnx.ModelProto()
    found.CopyFrom(cloud)
    infos = [helper.make_tensor_value_info(one.tensor, onnx.TensorProto.FLOAT, None) for one in transforms]
    _put(found.graph.output, infos)
    return found


def _with(halves: Halves, one: Transform) -> Halves:
    name, names = one.tensor, one.names
    device, cloud = onnx.ModelProto(), onnx.ModelProto()
    device.CopyFrom(halves.device)
    cloud.CopyFrom(halves.cloud)
    outputs = {info.name: info for info in device.graph.output}
    if name not in halves.crossing or name not in outputs:
        raise PlanError(f"{name[:60]!r} has a transform, and is not made on the device", _AGAIN)
    used = {said for graph in (device.graph, cloud.graph) for said in _names(graph)}
    if clash := next((said for said in used if said.startswith(f"{name}/unit")), None):
        raise PlanError(f"the model has a {clash[:60]!r}, as a transform would", "rename it, or take another way")
    keep = [info for info in device.graph.output if info.name != name or name in halves.kept]
    if name not in halves.kept:
        device.graph.value_info.append(outputs[name])
    dims = _dims(outputs[name])
    infos = [
        helper.make_tensor_value_info(part, onnx.TensorProto.FLOAT, dims and list(one.dims(dims, at)))
        for at, part in enumerate(names)
    ]
    ends = np.cumsum(one.groups)
    for at, (part, end) in enumerate(zip(names, ends, strict=True)):
        rows = one.forward[end - one.groups[at] : end]
        _there(device.graph, one, part, rows)
    _put(device.graph.output, [*keep, *infos])
    whole = f"{name}/units"
    after = list(cloud.graph.node)
    del cloud.graph.node[:]
    cloud.graph.node.append(helper.make_node("Concat", names, [whole], axis=one.axis))
    _back(cloud.graph, one, whole)
    cloud.graph.node.extend(after)
    _put(cloud.graph.input, [*(info for info in cloud.graph.input if info.name != name), *infos])
    crossing = [part for each in halves.crossing for part in (names if each == name else [each])]
    return replace(halves, device=device, cloud=cloud, crossing=tuple(crossing))


def _there(graph: onnx.GraphProto, one: Transform, made: str, rows: Features) -> None:
    """Appends nodes for some components: a convolution, or a product where the channels are last."""
    if one.axis == 1:
        kernel = rows.reshape(len(rows), -1, one.patch, one.patch)
        _append(graph, "Conv", one.tensor, made, kernel, -rows @ one.offset, one.patch)
    else:
        _append_product(graph, one.tensor, made, rows.T, -rows @ one.offset)


def _back(graph: onnx.GraphProto, one: Transform, given: str) -> None:
    """Appends nodes for the tensor, out of all its components."""
    if one.axis == 1:
        kernel = one.backward.T.reshape(one.components, -1, one.patch, one.patch)
        _append(graph, "ConvTranspose", given, one.tensor, kernel, one.mean_of_channels, one.patch)
    else:
        _append_product(graph, given, one.tensor, one.backward.T, one.offset)


def _append(
    graph: onnx.GraphProto, kind: str, given: str, made: str, kernel: Features, bias: Features, patch: int
) -> None:
    names = _held(graph, made, kernel, bias)
    sizes = [patch, patch]
    graph.node.append(helper.make_node(kind, [given, *names], [made], kernel_shape=sizes, strides=sizes))


def _append_product(graph: onnx.GraphProto, given: str, made: str, matrix: Features, offset: Features) -> None:
    weights, added = _held(graph, made, matrix, offset)
    graph.node.append(helper.make_node("MatMul", [given, weights], [f"{made}/unit/product"]))
    graph.node.append(helper.make_node("Add", [f"{made}/unit/product", added], [made]))


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Of all that it makes or has."""
    yield from (one.name for one in graph.initializer)
    yield from (name for node in graph.node for name in node.output)


def _held(graph: onnx.GraphProto, made: str, *values: Features) -> list[str]:
    """Names of values that are put among the weights."""
    names = [f"{made}/unit/matrix", f"{made}/unit/offset"]
    for name, value in zip(names, values, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
    return names


def _dims(info: onnx.ValueInfoProto) -> list[int | None] | None:
    kind = info.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [one.dim_value if one.HasField("dim_value") else None for one in kind.shape.dim]


def _put(field: object, infos: Sequence[onnx.ValueInfoProto]) -> None:
    copies = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in infos]
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
