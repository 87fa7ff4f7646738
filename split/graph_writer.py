"""Cuts an ONNX model: writes the device's and the cloud's part as a bundle, checked against the whole at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from isthmus.protocol.arrays import DTYPES
from isthmus.protocol.errors import PlanError
from isthmus.protocol.features import UNIT
from isthmus.protocol.pictures import names_picture
from isthmus.split.graph_manifest import CLOUD, DEVICE, STAGE, GraphExit, GraphManifest, Named, graph_id
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import given, outputs, session, sizes
from isthmus.split.onnx_picture import pictured
from isthmus.split.onnx_stages import stages
from isthmus.split.onnx_transform import transformed, undoing
from isthmus.split.onnx_writer import write_part
from isthmus.split.pictures import Preprocess, called
from isthmus.split.transform import Transform, axis_of, patches_of
from isthmus.split.writer import BundleWriter

UNDONE = 1e-4  # of its largest magnitude, that a tensor may be off when its transform is undone
_AGAIN = "plan again: isthmus plan"
TOLERANCE = {"float16": 4e-3}  # of the largest magnitude of an output: some roundings of its type
_USUAL = 1e-5
OWN, MOST_OWN = 2.0, 1e-2  # times what the whole is from itself, fused or not: so far parts may be; and in all
OTHERS = 2  # requests that one is run together with, to see whether each gets its own


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
    own = partial(_rounding, graph, file, feeds, whole)
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
            worst = _compared(*apart, graph, feeds, whole, own)
            _undone(first, session(undoing(cloud, shaped), writer.place(CLOUD), 1), features, feeds)
        else:
            worst = _compared(first, second, graph, feeds, whole, own)
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
        writer.commit(found.encode())
    return {
        "name": title,
        "model_id": found.model_id,
        "crossing": list(crossing),
        "worst": worst,
        "nodes": [len(here), len(graph.nodes) - len(here)],
        "codec": codec,
        "travels_bytes": sum(travels[one].nbytes for one in crossing),
    }


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
        if difference(one, two) > TOLERANCE.get(str(getattr(two, "dtype", "")), _USUAL):
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


def _undone(
    first: Sequence[ort.InferenceSession],
    back: ort.InferenceSession,
    features: Mapping[str, Any],
    feeds: Mapping[str, Any],
) -> None:
    """Has tensors transformed on the device and undone in the cloud.

    Raises:
        PlanError: they come out as others.
    """
    found = outputs(back, _wanted(back, _known(first, feeds)), list(features))
    for (name, value), mine in zip(features.items(), found, strict=True):
        if (off := difference(mine, value)) > UNDONE:
            raise PlanError(f"the transform of {name[:60]!r} is undone to {off:.2g} of its largest value only", _AGAIN)


def _compared(
    first: Sequence[ort.InferenceSession],
    second: ort.InferenceSession,
    graph: OnnxGraph,
    feeds: Mapping[str, Any],
    whole: Mapping[str, Any],
    own: Callable[[], Mapping[str, float]],
) -> float:
    """Runs the two parts after each other; the largest difference, of the largest magnitude of its output.

    Args:
        own: gives how far each output is from itself.
    """
    told, worst = _known([*first, second], feeds), 0.0
    for name, value in whole.items():
        if name in graph.inputs:
            continue
        off = difference(told[name], value)
        if off > TOLERANCE.get(str(value.dtype), _USUAL) and not off <= OWN * own()[name] <= MOST_OWN:
            problem = (
                f"the parts give another {name!r} ({value.dtype}) than the whole, by {off:.2g} of its largest value"
            )
            raise PlanError(problem, "cut it elsewhere; a model that draws random numbers cannot be cut")
        worst = max(worst, off)
    return worst


def _rounding(graph: OnnxGraph, file: Path, feeds: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, float]:
    """How far the whole model's outputs are when the runtime computes every node as it stands; infinite of such that
    are not always the same.
    """
    names = [name for name in whole if name not in graph.inputs]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    every = graph.part(range(len(graph.nodes)), graph.inputs, names)
    running = session(every, file, 1, options)
    once, again = (dict(zip(names, outputs(running, feeds), strict=True)) for _ in range(2))
    return {
        name: difference(once[name], whole[name]) if not difference(once[name], again[name]) else np.inf
        for name in names
    }


def batched(part: onnx.ModelProto, file: Path, given_: Mapping[str, Any]) -> tuple[onnx.ModelProto, bool]:
    """A part that takes the rows of several requests at once, where it gives each its own; else the part as it is.

    Args:
        file: the whole model, beside which weights may lie.
        given_: what one request gives it.
    """
    sizes = {value.shape[0] if value.ndim else 0 for value in given_.values()}
    if len(sizes) != 1 or not (rows := sizes.pop()):
        return part, False
    open_ = onnx.ModelProto()
    open_.CopyFrom(part)
    del open_.graph.value_info[:]
    for one in (*open_.graph.input, *open_.graph.output):
        if one.type.tensor_type.shape.dim:
            one.type.tensor_type.shape.dim[0].dim_param = "rows"
    if any(node.op_type.startswith("Dynamic") for node in open_.graph.node):
        return part, False  # it scales by what all rows hold
    asked = [dict(given_), *(_others(given_, seed) for seed in range(OTHERS))]
    if any(len({one[name].tobytes() for one in asked}) < len(asked) for name in given_):
        return part, False  # nothing is known of what others would give it
    try:
        running = session(open_, file, 1)
        apart = [outputs(running, one) for one in asked]
        together = outputs(running, {name: np.concatenate([one[name] for one in asked]) for name in given_})
    except PlanError:
        return part, False
    for at, found in enumerate(together):
        if not isinstance(found, np.ndarray) or not found.ndim or len(found) != len(asked) * rows:
            return part, False
        bound = TOLERANCE.get(str(found.dtype), _USUAL)
        for number, mine in enumerate(np.split(found, len(asked))):
            if difference(mine, apart[number][at]) > bound:
                return part, False
    return open_, True


def _others(given_: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What another request might give: numbers of another size and order; whole ones within the same range."""
    chance, found = np.random.default_rng(seed), {}
    for name, value in given_.items():
        if value.dtype.kind == "f":
            drawn = 10.0 ** (seed + 1) * chance.standard_normal(value.shape) * (np.std(value) + 1e-3) + np.mean(value)
            found[name] = drawn.astype(value.dtype)
        else:
            found[name] = chance.permutation(value.ravel()).reshape(value.shape)
    return found


def difference(mine: Any, other: Any) -> float:
    """How far one output is from another, as a share of the largest magnitude; infinite where they do not compare."""
    if not isinstance(other, np.ndarray):
        return 0.0 if repr(mine) == repr(other) else np.inf
    if not isinstance(mine, np.ndarray) or (mine.shape, mine.dtype) != (other.shape, other.dtype):
        return np.inf
    if other.dtype.kind not in "fc":
        return 0.0 if np.array_equal(mine, other) else np.inf
    same = np.isnan(mine) == np.isnan(other)
    infinite = np.isinf(other)
    if not same.all() or (mine[infinite] != other[infinite]).any():
        return np.inf
    sound = np.isfinite(other)
    if not sound.any():
        return 0.0
    off = np.abs(mine[sound].astype(np.float64) - other[sound].astype(np.float64)).max()
    most = float(np.abs(other[sound].astype(np.float64)).max())
    return float(off / most) if most else float(off)


def _loaded(path: Path) -> ort.InferenceSession:
    return session(onnx.load(str(path), load_external_data=False), path, 1)


def _known(parts: Sequence[ort.InferenceSession], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and all that parts give, one after the other."""
    found = dict(feeds)
    for running in parts:
        made = outputs(running, _wanted(running, found))
        found |= dict(zip([one.name for one in running.get_outputs()], made, strict=True))
    return found


def _wanted(running: ort.InferenceSession, values: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in running.get_inputs()}


def _named(graph: OnnxGraph, name: str, value: Any) -> Named:
    """A tensor; of its sizes those that the model leaves open are so."""
    if not isinstance(value, np.ndarray) or str(value.dtype) not in DTYPES:
        raise PlanError(f"{name!r} is no array of numbers", "cut another model")
    kind = graph.info(name).type.tensor_type
    dims: list[int | None] = [None] * value.ndim
    if kind.HasField("shape") and len(kind.shape.dim) == value.ndim:
        dims = [one.dim_value if one.HasField("dim_value") and one.dim_value > 0 else None for one in kind.shape.dim]
    return Named(name, str(value.dtype), tuple(dims))
