"""What an ONNX model's nodes take on this machine: times of onnxruntime's own kernels, fused as it fuses them.

The optimized graph is timed with the runtime's profiler. A node of it stands for those of the model whose last output
it makes; its time is shared among them as they take it when nothing is fused. All are scaled so that together they
take what the model takes without a profiler.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from isthmus.engine.affinity import use_threads
from isthmus.engine.graph_part import part_options
from isthmus.protocol.errors import PlanError, first_line
from isthmus.split.feeds import closed, drawn, read_feeds, size_of
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.timing import MOST, WARM, timed

PLAIN_RUNS = 5
_BLOCKED, _BACK = re.compile(r"(.+)_nchwc(?:_\d+)?\Z"), "ReorderOutput"
_FOLDER = "session.model_external_initializers_file_folder_path"


def measure(path: str, threads: int, shapes: Mapping[str, Sequence[int]], seconds: float, arrays: str = "") -> Any:
    """A model's profile, as plain data; see `profile.Profile`.

    Args:
        shapes: of inputs whose dimensions the model leaves open.
        seconds: that each of two rounds of runs may take.
        arrays: a .npz file with inputs; "" for random ones.
    """
    file = Path(path)
    model = read_model(file)
    graph = OnnxGraph(model)
    whole = session(model, file, threads, part_options())  # while nodes have their own names: errors name them
    for at, node in enumerate(graph.nodes):
        node.name = f"node{at}"
    feeds = given(graph, shapes, arrays)
    tensors = sizes(graph, file, feeds)
    whole_ms, first_ms = timed(partial(outputs, whole, feeds), seconds)
    node_ms = nodes_ms(graph, model, file, threads, feeds, seconds)
    scale = whole_ms / max(1e-9, sum(node_ms))
    return {
        "model": digest(file, model),
        "name": file.stem,
        "runtime": f"onnxruntime {ort.__version__}",
        "threads": threads,
        "whole_ms": whole_ms,
        "first_ms": first_ms,
        "nodes_ms": [ms * scale for ms in node_ms],
        "ops": [node.op_type for node in graph.nodes],
        "inputs": {name: size_of(feeds[name]) for name in graph.inputs},
        "tensors": tensors,
        "weights": [graph.weight_bytes(at) for at in range(len(node_ms))],
    }


def session(
    model: onnx.ModelProto, file: Path, threads: int, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """A model that runs; its external weights are read from where the file lies.

    Raises:
        PlanError: the runtime cannot run it (which operator, and where).
    """
    options = options or ort.SessionOptions()
    use_threads(options, threads)
    options.log_severity_level = 4
    options.add_session_config_entry(_FOLDER, str(file.parent.resolve()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no public class
        raise PlanError(f"onnxruntime cannot run {file.name}: {first_line(error)}", "export it again") from error


def given(graph: OnnxGraph, shapes: Mapping[str, Sequence[int]], arrays: str) -> dict[str, Any]:
    """Inputs: those of a file, else random ones (whole numbers are 1).

    Raises:
        PlanError: an input's shape is open, or the file does not fit.
    """
    loaded = read_feeds(arrays, graph.inputs, shapes)
    generator, feeds = np.random.default_rng(0), {}
    for name in graph.inputs:
        if name in loaded:
            feeds[name] = loaded[name]
            continue
        kind = graph.info(name).type.tensor_type
        if not kind.elem_type:
            raise PlanError(f"input {name!r} is no tensor", "give all inputs in a file")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = list(shapes[name]) if name in shapes else _closed(name, kind)
        feeds[name] = drawn(dtype, shape, generator)
    return feeds


def _closed(name: str, kind: Any) -> list[int]:
    """The dimensions of an input; a first one that is open is one."""
    if not kind.HasField("shape"):
        raise PlanError(f"the shape of input {name!r} is not known", f"give it: --shape {name}=1,3,224,224")
    return closed(name, [one.dim_value if one.HasField("dim_value") else 0 for one in kind.shape.dim])


def sizes(graph: OnnxGraph, file: Path, feeds: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The type, shape and bytes of every tensor between nodes; of what is no tensor, nothing."""
    names = [one.name for one in graph.tensors if one.name not in graph.inputs]
    names += [name for name in graph.outputs if name not in names]
    names = [name for name in names if graph.made_by(name) >= 0]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    whole = graph.part(range(len(graph.nodes)), graph.inputs, names)
    values = outputs(session(whole, file, 1, options), feeds, names)
    known = {**{name: feeds[name] for name in graph.inputs}, **dict(zip(names, values, strict=True))}
    return {name: size for name, value in known.items() if (size := size_of(value))}


def learn(graph: OnnxGraph, file: Path, feeds: Mapping[str, Any]) -> None:
    """Tells a graph the types and shapes of what its nodes hand on, as they are for these inputs."""
    graph.learn(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape, _) in sizes(graph, file, feeds).items()
    )


def nodes_ms(
    graph: OnnxGraph, model: onnx.ModelProto, file: Path, threads: int, feeds: Mapping[str, Any], seconds: float
) -> list[float]:
    """What each node takes, in milliseconds, before it is scaled."""
    plain, _ = _profiled(model, file, threads, feeds, seconds / 2, fused=False)
    fused, optimized = _profiled(model, file, threads, feeds, seconds, fused=True)
    alone = [plain.get(f"node{at}", 0.0) for at in range(len(graph.nodes))]
    found = [0.0] * len(graph.nodes)
    spread = 0.0
    for name, members in _groups(graph, optimized).items():
        ms, weight = fused.get(name, 0.0), sum(alone[at] for at in members)
        if not members:
            spread += ms  # of layouts, mostly: all nodes bear it; what bodies of If and Loop take is in theirs
        for at in members:
            found[at] += ms * (alone[at] / weight if weight > 0 else 1 / len(members))
    total = sum(found)
    return [ms * (1 + spread / total) for ms in found] if total > 0 else alone


def _groups(graph: OnnxGraph, optimized: onnx.GraphProto) -> dict[str, list[int]]:
    """The nodes of the model that each of the optimized graph stands for, by its name."""
    ends: dict[int, str] = {}
    for node in optimized.node:
        blocked = _BLOCKED.match(node.name)  # named after what it makes, in another layout
        for name in (*node.output, *(blocked.groups() if blocked and node.op_type != _BACK else ())):
            if graph.made_by(name) >= 0:
                ends.setdefault(graph.made_by(name), node.name)
        if node.name.startswith("node") and node.name[4:].isdecimal():
            ends.setdefault(int(node.name[4:]), node.name)
    groups: dict[str, list[int]] = defaultdict(list)
    for node in optimized.node:
        groups[node.name] = []
    users: dict[int, list[int]] = defaultdict(list)
    for one in graph.tensors:
        if one.producer >= 0:
            users[one.producer] += one.consumers
    owner: dict[int, str] = {}
    for at in reversed(range(len(graph.nodes))):  # what is fused goes with what uses it
        after = [owner[user] for user in users[at] if user in owner]
        owner[at] = ends.get(at) or (after[0] if after else "")
        groups[owner[at]].append(at)
    groups.pop("", None)
    return dict(groups)


def _profiled(
    model: onnx.ModelProto, file: Path, threads: int, feeds: Mapping[str, Any], seconds: float, *, fused: bool
) -> tuple[dict[str, float], onnx.GraphProto]:
    """Median milliseconds by the name of a node, and the graph that was run."""
    with tempfile.TemporaryDirectory(prefix="isthmus-profile-") as folder:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/times"
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
        saved = Path(folder) / "optimized.onnx"
        if fused:
            options.optimized_model_filepath = str(saved)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        running = session(model, file, threads, options)
        began, runs = time.perf_counter(), 0
        while runs < WARM + PLAIN_RUNS or (time.perf_counter() - began < seconds and runs < WARM + MOST):
            outputs(running, feeds, None)
            runs += 1
        events = json.loads(Path(running.end_profiling()).read_text())
        graph = onnx.load(str(saved), load_external_data=False).graph if fused else model.graph
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return {
        name: statistics.median(took[len(took) * WARM // runs :]) * (len(took) / runs) for name, took in times.items()
    }, graph


def outputs(running: ort.InferenceSession, feeds: Mapping[str, Any], names: list[str] | None = None) -> list[Any]:
    """What a model gives.

    Raises:
        PlanError: it refuses its inputs.
    """
    try:
        return list(running.run(names, dict(feeds)))
    except Exception as error:  # the runtime's errors share no public class
        remedy = "give inputs that fit: --shape NAME=1,3,224,224 or --input FILE.npz"
        raise PlanError(f"the model refuses its inputs: {first_line(error)}", remedy) from error
