"""Cuts an ONNX model: writes the device's and the cloud's part as a bundle, checked against the whole at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from isthmus.protocol.arrays import DTYPES
from isthmus.protocol.errors import PlanError
from isthmus.protocol.features import UNIT
from isthmus.protocol.pictures import names_picture
from isthmus.split.graph_check import batched, compared, difference, rounding, tolerance, undone
from isthmus.split.graph_manifest import CLOUD, DEVICE, EDGE, STAGE, GraphExit, GraphManifest, Named, graph_id
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph, within
from isthmus.split.onnx_measure import given, outputs, session, sizes
from isthmus.split.onnx_picture import pictured
from isthmus.split.onnx_stages import stages
from isthmus.split.onnx_transform import transformed, undoing
from isthmus.split.onnx_writer import write_part
from isthmus.split.pictures import Preprocess, called
from isthmus.split.transform import Transform, axis_of, patches_of
from isthmus.split.tried import key, remember
from isthmus.split.writer import BundleWriter

_AGAIN = "plan again: isthmus plan"


def write_graph(
    model: str,
    checked: str,
    nodes: Sequence[int],
    output: str,
    name: str = "",
    force: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    arrays: str = "",
    codec: str = "",
    transforms: Sequence[Any] = (),
    exits: Sequence[Any] = (),
    preprocess: Mapping[str, Any] | None = None,
    edge: Sequence[int] = (),
) -> Any:
    """Writes a bundle; what it says, as plain data.

    Args:
        checked: the sha256 that the model must have, "" for any.
        nodes: numbers of those on the device; none has the inputs travel.
        shapes, arrays: of the inputs that it is checked on; as `onnx_measure.measure` has them.
        codec: in which what travels will be sent; one for pictures has the network given the picture itself.
        transforms: of what travels, each as plain data.
        exits: at outputs that the device makes, in the order in which they are reached, each as plain data.
        preprocess: what is done with pictures before the network, as plain data.
        edge: numbers of nodes of an edge server's, which shares the cloud's part with a cloud behind it: how, stands in
            a bundle of its own in this one's folder `EDGE`.

    Raises:
        PlanError: it is another model, there is nothing to cut, something cannot travel, or the parts do not give what
            the whole gives.
        BundleError: the place is taken or cannot be written.
    """
    file = Path(model)
    proto = read_model(file)
    graph, sha256 = OnnxGraph(proto), digest(file, proto)
    if checked and checked != sha256:
        raise PlanError(f"the plan is of another model, or another version of {file.name}", _AGAIN)
    here = set(nodes)
    how = msgspec.convert(preprocess, Preprocess) if preprocess is not None else None
    if names_picture(codec):
        if how is None or here:
            raise PlanError(f"the plan sends {called(codec)}, and not to a cloud that has all of the network", _AGAIN)
        if arrays:
            raise PlanError("a way that sends pictures is checked on one of its own", "leave --input out")
        proto, how, feeds = _pictured(proto, how, file, shapes or {})
        graph = OnnxGraph(proto)
    else:
        feeds = given(graph, shapes or {}, arrays)
    crossing = graph.halves(here).crossing if here else graph.handed_over().crossing  # refused now, if it is no cut
    whole = dict(zip(graph.outputs, outputs(session(proto, file, 1), feeds), strict=True))
    own = partial(rounding, graph, file, feeds, whole)
    travels = _travelling(graph, file, crossing, feeds)
    leaving = tuple(msgspec.convert(list(exits), list[GraphExit]))
    types = {one: (str(value.dtype), value.ndim) for one, value in travels.items()}
    if leaving:  # the device's part is written in pieces, of whose seams the types must be known, too
        types |= {one: (dtype, len(shape)) for one, (dtype, shape, _) in sizes(graph, file, feeds).items()}
    graph.learn(
        onnx.helper.make_tensor_value_info(one, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * ndim)
        for one, (dtype, ndim) in types.items()
    )
    between = [_named(graph, one, travels[one]) for one in crossing]
    plain = halves = graph.halves(here) if here else graph.handed_over()
    shaped = _agreed(msgspec.convert(list(transforms), list[Transform]), codec, travels)
    features = {one.tensor: travels[one.tensor] for one in shaped}
    if shaped:
        for one in shaped:
            travels |= dict(zip(one.names, one.split(travels[one.tensor]), strict=True))
        halves, between = transformed(halves, shaped), _transformed(between, shaped)
        crossing = halves.crossing
    cloud, batches = batched(halves.cloud, file, {one: travels[one] for one in crossing})
    with BundleWriter(Path(output), force=force) as writer:
        parts = {CLOUD: cloud}
        for at, piece in enumerate(stages(halves.device, [one.output for one in leaving])):
            if piece is not None:
                parts[STAGE.format(at + 1) if at else DEVICE] = piece
        for target, part in parts.items():
            for written in write_part(part, file, writer.place(target)):
                writer.take(f"{target.partition('/')[0]}/{written.name}")
        second, *first = (_loaded(writer.place(target)) for target in parts)
        if shaped:  # what they round may decide between two answers that are alike: it is not counted
            apart = [session(plain.device, file, 1)], session(plain.cloud, file, 1)
            worst = compared(*apart, graph, feeds, whole, own)
            undone(first, session(undoing(cloud, shaped), writer.place(CLOUD), 1), features, feeds)
        else:
            worst = compared(first, second, graph, feeds, whole, own)
        title = name or file.stem
        given_to = tuple(_named(graph, one, feeds[one]) for one in graph.inputs)
        given_by = tuple(_named(graph, one, whole[one]) for one in graph.outputs)
        tensors = given_to, given_by, tuple(between)
        identity, files = graph_id(writer.files, tensors), dict(writer.files)
        found = GraphManifest(
            title,
            identity,
            sha256,
            *tensors,
            halves.kept,
            files,
            batches=batches,
            codec=codec,
            exits=leaving,
            preprocess=how,
        )
        found.check()
        if edge:
            _shared_on(writer.place(f"{EDGE}/bundle.json").parent, writer.place(CLOUD), travels, here, edge, title)
        writer.commit(found.encode())
        for target in parts:
            remember(key(target, files))
    return {
        "name": title,
        "model_id": found.model_id,
        "crossing": list(crossing),
        "worst": worst,
        "nodes": [len(here), len(graph.nodes) - len(here)],
        "codec": codec,
        "travels_bytes": sum(travels[one].nbytes for one in crossing),
    }


def _shared_on(
    folder: Path, part: Path, given_: Mapping[str, Any], device: Collection[int], edge: Sequence[int], name: str
) -> None:
    """Cuts the cloud's part once more, between an edge server and a cloud."""
    with TemporaryDirectory(prefix="isthmus-split-") as work:
        arrays = Path(work) / "given.npz"
        np.savez(arrays, **{one: given_[one] for one in OnnxGraph(read_model(part)).inputs})
        folder.rmdir()
        write_graph(
            str(part), "", within(device, edge), str(folder), f"{name}, from the edge server on", arrays=str(arrays)
        )


def _pictured(
    proto: onnx.ModelProto, how: Preprocess, file: Path, shapes: Mapping[str, Sequence[int]]
) -> tuple[onnx.ModelProto, Preprocess, dict[str, Any]]:
    """A network that is given pictures, what is left to be done with them, and one of noise to check it on."""
    found, left = pictured(proto, how)
    sizes = {name: shape for name, shape in shapes.items() if name != how.input}
    others = {name: value for name, value in given(OnnxGraph(found), sizes, "").items() if name != left.input}
    noise = np.random.default_rng(0).integers(0, 256, (*how.size, 3)).astype(np.uint8)
    feeds = {**others, left.input: left.array(noise)}
    wanted = outputs(session(proto, file, 1), {**others, how.input: how.array(noise)})
    for one, two in zip(outputs(session(found, file, 1), feeds), wanted, strict=True):
        if difference(one, two) > tolerance(two):
            raise PlanError("the network answers pictures otherwise than what is made of them", "send another way")
    return found, left, feeds


def _transformed(between: Sequence[Named], transforms: Sequence[Transform]) -> list[Named]:
    """What travels of tensors, some of them transformed."""
    known, found = {one.tensor: one for one in transforms}, list[Named]()
    for tensor in between:
        if tensor.name not in known:
            found.append(tensor)
            continue
        one = known[tensor.name]
        found += [Named(name, tensor.dtype, one.dims(tensor.shape, at)) for at, name in enumerate(one.names)]
    return found


def _agreed(transforms: Sequence[Transform], codec: str, travels: Mapping[str, Any]) -> Sequence[Transform]:
    """Transforms that are what they have to be for what travels.

    Raises:
        PlanError: one is not.
    """
    known = {one.tensor for one in transforms}
    if len(known) < len(transforms):
        raise PlanError("the plan transforms a tensor twice", _AGAIN)
    floats = {name for name, value in travels.items() if value.dtype.kind == "f"}
    if bool(known) != (codec == UNIT) or (known and floats - known):
        raise PlanError(f"the plan's codec {codec!r} does not go with its transforms", _AGAIN)
    for one in transforms:
        if one.tensor not in travels:
            raise PlanError(f"the plan has a transform of {one.tensor[:60]!r}, which does not travel", _AGAIN)
        one.check()
        tensor = travels[one.tensor]
        fits = axis_of(tensor) == one.axis and tensor.shape[one.axis] == one.channels
        if not fits or one.patch not in patches_of(tensor.shape):
            raise PlanError(f"the plan's transform of {one.tensor[:60]!r} is of another shape", _AGAIN)
    return transforms


def _travelling(graph: OnnxGraph, file: Path, crossing: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What travels, as it is for these inputs."""
    found = {name: feeds[name] for name in crossing if name in graph.inputs}
    names = [name for name in crossing if name not in found]
    if names:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        whole = graph.part(range(len(graph.nodes)), graph.inputs, names)
        found |= dict(zip(names, outputs(session(whole, file, 1, options), feeds, names), strict=True))
    for name, value in found.items():
        if not isinstance(value, np.ndarray) or str(value.dtype) not in DTYPES:
            kind = str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
            raise PlanError(f"{name!r} would travel, and is of type {kind}", "cut it elsewhere")
    return found


def _loaded(path: Path) -> ort.InferenceSession:
    return session(onnx.load(str(path), load_external_data=False), path, 1)


def _named(graph: OnnxGraph, name: str, value: Any) -> Named:
    """A tensor; of its sizes those that the model leaves open are so."""
    if not isinstance(value, np.ndarray) or str(value.dtype) not in DTYPES:
        raise PlanError(f"{name!r} is no array of numbers", "cut another model")
    kind = graph.info(name).type.tensor_type
    dims: list[int | None] = [None] * value.ndim
    if kind.HasField("shape") and len(kind.shape.dim) == value.ndim:
        dims = [one.dim_value if one.HasField("dim_value") and one.dim_value > 0 else None for one in kind.shape.dim]
    return Named(name, str(value.dtype), tuple(dims))
