"""Models of the onnx package's own tests, in two parts at every place: together they give what the whole gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_graph import OnnxGraph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from isthmus.split.graph_check import difference  # noqa: E402
from isthmus.split.onnx_file import read_model  # noqa: E402
from isthmus.split.onnx_measure import given, outputs  # noqa: E402
from isthmus.split.onnx_measure import session as fused  # noqa: E402

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MODELS = sorted(DATA.glob("simple/*/model.onnx")) + sorted(DATA.glob("pytorch-converted/*/model.onnx"))
LIGHT = sorted(DATA.glob("light/light_*.onnx"))
PLACES, WORST = 2, 1e-5
TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
Feed = dict[str, NDArray[Any]]
# Of the 105 models those whose old operators onnxruntime runs, and that take tensors of numbers.
LEAST = 60


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the same kernels in all parts
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: Any, names: list[str], given: Feed) -> Feed:
    opened = session(model)
    return dict(zip(names, opened.run(names, {one.name: given[one.name] for one in opened.get_inputs()}), strict=True))


def some_input(opened: Any, inputs: list[str]) -> Feed:
    chance = np.random.default_rng(0)
    found: Feed = {}
    for one in opened.get_inputs():
        if one.name in inputs:
            shape = [size if isinstance(size, int) else 2 for size in one.shape]
            found[one.name] = np.asarray(3 * chance.normal(size=shape)).astype(TYPES[one.type])
    return found


def in_parts(graph: OnnxGraph, given: Feed, count: int) -> Feed:
    """The first `count` nodes here, the others there."""
    device, cloud = range(count), range(count, len(graph.nodes))
    travels = graph.crossing(device)
    known = dict(given)
    for nodes, inputs, wanted in (
        (device, graph.inputs, [*travels, *graph.outputs]),
        (cloud, travels, graph.outputs),
    ):
        makes = list(dict.fromkeys(name for name in wanted if graph.made_by(name) in nodes))
        if makes:
            needed = {name for at in nodes for name in graph.needs[at]}
            known |= run(graph.part(nodes, [name for name in inputs if name in needed], makes), makes, known)
    return {name: known[name] for name in graph.outputs}


def test_parts_give_what_the_whole_gives() -> None:
    cuts = models = 0
    for path in MODELS:
        model = onnx.load(path)
        try:
            opened = session(model)
            graph = OnnxGraph(model)
            given = some_input(opened, graph.inputs)
            whole = dict(zip(graph.outputs, opened.run(graph.outputs, given), strict=True))
        except PlanError:
            raise
        except Exception:  # what onnxruntime itself cannot run, by its own many errors
            continue
        graph.learn(onnx.shape_inference.infer_shapes(model).graph.value_info)
        models += 1
        for count in range(len(graph.nodes) + 1):
            for name, value in in_parts(graph, given, count).items():
                np.testing.assert_array_equal(value, whole[name], err_msg=f"{path.parent.name} after {count} nodes")
            cuts += 1
    assert models >= LEAST and cuts > 2 * models


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_parts_of_a_whole_convolutional_network(path: Path) -> None:
    """At some places, fused as they would run; `benchmarks/cuts.py` tries all."""
    model = read_model(path)
    graph = OnnxGraph(model)
    feeds = given(graph, {}, "")
    whole = dict(zip(graph.outputs, outputs(fused(model, path, 1), feeds), strict=True))
    graph.learn(onnx.shape_inference.infer_shapes(model).graph.value_info)
    places = np.random.default_rng(len(graph.nodes)).permutation(np.arange(1, len(graph.nodes)))
    for count in places[:PLACES].tolist():
        halves, known = graph.halves(range(count)), dict(feeds)
        for part in (halves.device, halves.cloud):
            running = fused(part, path, 1)
            takes = {one.name: known[one.name] for one in running.get_inputs()}
            known |= dict(zip([one.name for one in running.get_outputs()], outputs(running, takes), strict=True))
        for name, value in whole.items():
            assert difference(known[name], value) <= WORST, f"{name}, after {count} nodes"
