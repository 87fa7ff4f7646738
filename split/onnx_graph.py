"""An ONNX model as a graph of nodes, and the models of its parts.

A part is made of whole nodes. What subgraphs (the bodies of If, Loop and Scan) take from outside counts as an input of
their node; initializers and constants go with every part that uses them. Weights that lie in files beside the model
stay there until they are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx
import onnx.shape_inference

from isthmus.protocol.errors import PlanError
from isthmus.split.graph import Crossing
from isthmus.split.onnx_file import MAX_DEPTH, tensor_bytes, tensors_in

_CONSTANT = "Constant"
_LARGE = 1024  # bytes of weights that are worth being counted once

IR_VERSION = 4  # of parts, at least: before it weights had to be inputs as well


@dataclass(frozen=True, slots=True)
class Halves:
    """A model cut in two.

    Attributes:
        device, cloud: models; the device's gives what travels and what it keeps.
        crossing: names of what travels; the cloud's is given them.
        kept: outputs of the model that the cloud does not make.
    """

    device: onnx.ModelProto
    cloud: onnx.ModelProto
    crossing: tuple[str, ...]
    kept: tuple[str, ...]


class OnnxGraph:
    """A model whose nodes are numbered in an order in which they can run; constants are no nodes.

    Args:
        model: with its weights' places, not necessarily their values.

    Attributes:
        nodes: in order.
        inputs, outputs: names that the model is given and gives; initializers are no inputs.

    Raises:
        PlanError: the graph has a cycle, uses what nobody makes, or makes something twice.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.model = model
        self._initializers = {one.name: one for one in graph.initializer}
        self._sparse = {one.values.name: one for one in graph.sparse_initializer}
        self._constants = {node.output[0]: node for node in graph.node if _is_constant(node)}
        self._fixed = {*self._initializers, *self._sparse, *self._constants}
        self.inputs = [one.name for one in graph.input if one.name not in self._fixed]
        self.outputs = [one.name for one in graph.output]
        self._infos = {one.name: one for one in (*graph.value_info, *graph.output, *graph.input)}
        self.nodes = self._ordered([node for node in graph.node if not _is_constant(node)])
        self._maker = {name: at for at, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def needs(self) -> list[tuple[str, ...]]:
        """Names that each node uses and some node or the caller makes."""
        return [tuple(name for name in used_names(node) if name not in self._fixed) for node in self.nodes]

    @cached_property
    def tensors(self) -> list[Crossing]:
        """All that nodes hand on to each other, and the model's inputs."""
        users: dict[str, list[int]] = {name: [] for name in self.inputs}
        for at, names in enumerate(self.needs):
            for name in names:
                users.setdefault(name, []).append(at)
        return [Crossing(name, self._maker.get(name, -1), tuple(at)) for name, at in users.items()]

    def constants_of(self, node: int) -> list[str]:
        """Names of the initializers and constants that a node uses, each once."""
        return list(dict.fromkeys(name for name in used_names(self.nodes[node]) if name in self._fixed))

    def weight_bytes(self, node: int) -> int:
        """Of all constants that a node uses, and of those in its bodies; what several nodes use counts for each."""
        inside = sum(tensor_bytes(one) for one in tensors_in(self.nodes[node]) if one.data_type)
        return inside + sum(self.constant_bytes(name) for name in self.constants_of(node))

    def constant_bytes(self, name: str) -> int:
        """What the values of an initializer or a constant take, where that is known without them."""
        fixed = self._initializers.get(name)
        if fixed is None:
            node = self._constants.get(name)
            fixed = next((one.t for one in node.attribute if one.name == "value"), None) if node is not None else None
        return tensor_bytes(fixed) if fixed is not None else 0

    @cached_property
    def shared_weights(self) -> list[tuple[tuple[int, ...], int]]:
        """Numbers of the nodes that use the same constants, and bytes of these, if that is a kilobyte or more."""
        users: dict[str, list[int]] = {}
        for node in range(len(self.nodes)):
            for name in self.constants_of(node):
                users.setdefault(name, []).append(node)
        sizes: dict[tuple[int, ...], int] = {}
        for name, nodes in users.items():
            if len(nodes) > 1:
                sizes[tuple(nodes)] = sizes.get(tuple(nodes), 0) + self.constant_bytes(name)
        return [(nodes_, size) for nodes_, size in sizes.items() if size >= _LARGE]

    def made_by(self, name: str) -> int:
        """Number of the node that makes a tensor, -1 for an input of the model or a constant."""
        return self._maker.get(name, -1)

    def crossing(self, device: Collection[int]) -> list[str]:
        """Names that travel when these nodes run on the device and the others in the cloud, in a fixed order.

        Inputs of the model that the cloud's nodes use travel, too; so does an output of the model that the device
        makes and the cloud uses. Other outputs of the device stay.

        Raises:
            PlanError: the device would need what the cloud makes.
        """
        here = set(device)
        names: dict[str, None] = {}
        for at, needs in enumerate(self.needs):
            for name in needs:
                there = self._maker.get(name, -1) not in here and name in self._maker
                if at in here and there:
                    made = self._called(self._maker[name])
                    raise PlanError(f"{self._called(at)} on the device needs {name!r}, which {made} makes in the cloud")
                if at not in here and not there:
                    names[name] = None
        return list(names)

    def halves(self, device: Collection[int]) -> Halves:
        """The models of the device, which has these nodes, and of the cloud, which has the others.

        Raises:
            PlanError: one of them has no node or makes no output, or the device would need what the cloud makes.
        """
        here = set(device)
        there = [at for at in range(len(self.nodes)) if at not in here]
        if not here or not there:
            side = "device" if not there else "cloud"
            raise PlanError(f"all nodes are on the {side}, so there is nothing to cut", "choose a way that is a split")
        return self._halves(here, there)

    def handed_over(self) -> Halves:
        """As `halves`, with all nodes in the cloud: the device's part is empty, and the inputs travel."""
        return self._halves(set(), list(range(len(self.nodes))))

    def _halves(self, here: set[int], there: list[int]) -> Halves:
        crossing = self.crossing(here)
        made = [name for name in self.outputs if self._maker.get(name, -1) not in here and name in self._maker]
        if not made:
            raise PlanError("the cloud's part makes none of the model's outputs", "cut it elsewhere")
        kept = [name for name in self.outputs if name not in made]
        used = {name for at in here for name in self.needs[at]}
        inputs = [name for name in self.inputs if name in used]
        given = dict.fromkeys(name for name in (*crossing, *kept) if name not in self.inputs)
        return Halves(
            self.part(here, inputs, list(given)), self.part(there, crossing, made), tuple(crossing), tuple(kept)
        )

    def part(self, nodes: Collection[int], inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """A model of some nodes.

        Args:
            inputs: names that it is given: all that its nodes need and do not make.
            outputs: names that it gives; one of `inputs` or a constant is handed through.
        """
        chosen = [self.nodes[at] for at in sorted(set(nodes))]
        used = dict.fromkeys(name for node in chosen for name in used_names(node))
        fixed = [name for name in used if name in self._fixed]
        fixed += [name for name in outputs if name in self._fixed and name not in used]
        made = {name for node in chosen for name in node.output}
        part = onnx.ModelProto()
        part.CopyFrom(_without_graph(self.model))
        part.ir_version = max(part.ir_version, IR_VERSION)
        graph = part.graph
        graph.name = self.model.graph.name or "part"
        graph.node.extend(self._constants[name] for name in fixed if name in self._constants)
        graph.initializer.extend(self._initializers[name] for name in fixed if name in self._initializers)
        graph.sparse_initializer.extend(self._sparse[name] for name in fixed if name in self._sparse)
        graph.node.extend(chosen)
        graph.input.extend(self.info(name) for name in inputs)
        graph.output.extend(self.info(name) for name in outputs)
        graph.value_info.extend(
            self._infos[name] for name in made if name in self._infos and name not in {*inputs, *outputs}
        )
        return part

    def info(self, name: str) -> onnx.ValueInfoProto:
        """Type and shape of a tensor, as far as the model says them; onnxruntime infers the rest of an output."""
        if name in self._infos:
            info: onnx.ValueInfoProto = self._infos[name]
            return info
        fixed = self._initializers.get(name)
        if fixed is not None:
            return onnx.helper.make_tensor_value_info(name, fixed.data_type, list(fixed.dims))
        return onnx.helper.make_empty_tensor_value_info(name)

    def learn(self, infos: Iterator[onnx.ValueInfoProto] | Sequence[onnx.ValueInfoProto]) -> None:
        """Takes in types and shapes that were inferred or measured."""
        for info in infos:
            self._infos.setdefault(info.name, info)

    def _ordered(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """In an order in which they can run: the file's own where that is one, as it must be."""
        known = {*self.inputs, *self._fixed, ""}
        makers: dict[str, int] = {}
        for at, node in enumerate(nodes):
            for name in node.output:
                if name and (name in makers or name in known):
                    raise PlanError(f"{name!r} is made twice", "the model is not valid ONNX")
                makers[name] = at
        order: list[onnx.NodeProto] = []
        placed: set[int] = set()
        for first in range(len(nodes)):
            stack = [(first, iter(used_names(nodes[first])))]
            path = {first}
            if first in placed:
                continue
            while stack:
                at, names = stack[-1]
                for name in names:
                    if name in known:
                        continue
                    maker = makers.get(name)
                    if maker is None:
                        raise PlanError(f"nobody makes {name!r}, which {_called(nodes[at])} uses", "export it again")
                    if maker in path:
                        raise PlanError(f"the graph has a cycle through {name!r}", "the model is not valid ONNX")
                    if maker not in placed:
                        stack.append((maker, iter(used_names(nodes[maker]))))
                        path.add(maker)
                        break
                else:
                    stack.pop()
                    path.discard(at)
                    placed.add(at)
                    order.append(nodes[at])
                    known.update(nodes[at].output)
        return order

    def _called(self, at: int) -> str:
        return _called(self.nodes[at])


def within(device: Collection[int], chosen: Collection[int]) -> list[int]:
    """Numbers of nodes in the model of all nodes that are not the device's."""
    here, wanted = set(device), set(chosen)
    rest = [at for at in range(max((*here, *wanted), default=-1) + 1) if at not in here]
    return [place for place, at in enumerate(rest) if at in wanted]


def declared(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Sizes of tensors as a model says them itself, and what follows from that; 0 for one that it leaves open."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # what is damaged is said by who runs it
        graph = model.graph
    infos = (one for some in (graph.value_info, graph.input, graph.output) for one in some)
    return {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in infos}


def used_names(node: onnx.NodeProto) -> list[str]:
    """Names that a node uses, those that its subgraphs take from outside included, each once."""
    names = dict.fromkeys(name for name in node.input if name)
    for body in _bodies(node):
        names.update(dict.fromkeys(_captured(body, 0)))
    return list(names)


def _captured(graph: onnx.GraphProto, depth: int) -> list[str]:
    """What a subgraph uses and does not make."""
    if depth > MAX_DEPTH:
        raise PlanError(f"subgraphs lie more than {MAX_DEPTH} deep in each other", "simplify the model")
    inside = {one.name for one in (*graph.input, *graph.initializer)}
    inside |= {one.values.name for one in graph.sparse_initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        names = [name for name in node.input if name]
        for body in _bodies(node):
            names += _captured(body, depth + 1)
        found.update(dict.fromkeys(name for name in names if name not in inside))
        inside.update(node.output)
    found.update(dict.fromkeys(one.name for one in graph.output if one.name not in inside))
    return list(found)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == _CONSTANT and node.domain in ("", "ai.onnx") and len(node.output) == 1


def _called(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def _without_graph(model: onnx.ModelProto) -> Any:
    """Versions, functions and metadata."""
    found = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(found, field.name).extend(value)
        else:
            setattr(found, field.name, value)
    return found
