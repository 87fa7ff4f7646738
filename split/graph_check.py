"""Whether the parts of a network give what the whole gives, and whether the cloud's gives each request its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import outputs, session

UNDONE = 1e-4  # of its largest magnitude, that a tensor may be off when its transform is undone
TOLERANCE = {"float16": 4e-3}  # of the largest magnitude of an output: some roundings of its type
_USUAL = 1e-5
OWN, MOST_OWN = 2.0, 1e-2  # times what the whole is from itself, fused or not: so far parts may be; and in all
OTHERS = 2  # requests that one is run together with, to see whether each gets its own
_AGAIN = "plan again: isthmus plan"


def tolerance(output: Any) -> float:
    """How far an output may be off, as a share of its largest magnitude."""
    return TOLERANCE.get(str(getattr(output, "dtype", "")), _USUAL)


def compared(
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
        if off > tolerance(value) and not off <= OWN * own()[name] <= MOST_OWN:
            problem = (
                f"the parts give another {name!r} ({value.dtype}) than the whole, by {off:.2g} of its largest value"
            )
            raise PlanError(problem, "cut it elsewhere; a model that draws random numbers cannot be cut")
        worst = max(worst, off)
    return worst


def rounding(graph: OnnxGraph, file: Path, feeds: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, float]:
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


def undone(
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
        bound = tolerance(found)
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


def _known(parts: Sequence[ort.InferenceSession], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and all that parts give, one after the other."""
    found = dict(feeds)
    for running in parts:
        made = outputs(running, _wanted(running, found))
        found |= dict(zip([one.name for one in running.get_outputs()], made, strict=True))
    return found


def _wanted(running: ort.InferenceSession, values: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in running.get_inputs()}
