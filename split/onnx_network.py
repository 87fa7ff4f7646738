"""A model, two profiles and a link as the network that `cut` and `budget` know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isthmus.protocol.arrays import DTYPES
from isthmus.protocol.errors import PlanError
from isthmus.split.cut import Cut, Flow, Network, Shared, Use
from isthmus.split.graph import Graph
from isthmus.split.graph_exits import NONE, Leaving
from isthmus.split.profile import Profile, TensorSize

FLOATS = ("float32", "float16", "float64")
DEVICE, CLOUD = 0, 1
MEMORY, ENERGY = "MB", "J"  # what may be budgeted beside time
MESSAGE = 120  # bytes of a message beside its tensors, encryption included
SERVICE_MS = 1.0  # of a request beside trip, bytes and nodes, as measured: messages, and threads that wake


@dataclass(frozen=True, slots=True)
class Rate:
    """A link as the search sees it.

    Attributes:
        trip_ms: there and back, of a message without weight.
        up_bps, down_bps: bits per second.

    Raises:
        PlanError: it never delivers.
    """

    trip_ms: float
    up_bps: float
    down_bps: float

    def __post_init__(self) -> None:
        for what, bps in (("up", self.up_bps), ("down", self.down_bps)):
            if not 1 <= bps < math.inf:
                raise PlanError(
                    f"the link carries {bps:g} bit/s {what}, so nothing arrives",
                    "give a rate of a bit per second or more",
                )
        if not 0 <= self.trip_ms < math.inf:
            raise PlanError(f"the link's round trip is {self.trip_ms:g} ms", "give 0 or more")

    def up_ms(self, size: float) -> float:
        """What so many bytes take up."""
        return size * 8e3 / self.up_bps

    def down_ms(self, size: float) -> float:
        """What so many bytes take down."""
        return size * 8e3 / self.down_bps


@dataclass(frozen=True, slots=True)
class Codec:
    """How tensors of floating-point numbers travel; others travel as they are.

    Attributes:
        bits: of a value, on average; None for as it is.
        encode_ms, decode_ms: of a million values, on the device and in the cloud.
    """

    name: str = "f32"
    bits: float | None = None
    encode_ms: float = 0.0
    decode_ms: float = 0.0

    def size(self, tensor: TensorSize) -> float:
        """Bytes of a tensor on the wire."""
        if self.bits is None or tensor.dtype not in FLOATS:
            return float(tensor.bytes)
        return self.bits / 8 * math.prod(tensor.shape)

    def work_ms(self, tensor: TensorSize) -> float:
        """What coding a tensor takes on both sides."""
        if self.bits is None or tensor.dtype not in FLOATS:
            return 0.0
        return (self.encode_ms + self.decode_ms) * math.prod(tensor.shape) * 1e-6


@dataclass(frozen=True)
class Sharing:
    """A model between a device and a cloud.

    Attributes:
        cloud_ms: that a request takes beside the model's nodes and what is on the wire; see `SERVICE_MS`.
        device_watts, radio_watts: of the device, while it computes, and while something travels.
        leaving: exits on the device; who leaves there asks nothing of the link and the cloud.

    Raises:
        PlanError: a profile is another model's.
    """

    graph: Graph
    device: Profile
    cloud: Profile
    rate: Rate
    codec: Codec = Codec()
    cloud_ms: float = 0.0
    device_watts: float = 0.0
    radio_watts: float = 0.0
    leaving: Leaving = NONE

    def __post_init__(self) -> None:
        if self.device.model != self.cloud.model:
            raise PlanError("the profiles of device and cloud are of two models", "measure both with the same file")

    def network(self) -> Network:
        """What is to be cut; budgets are `MEMORY` for weights on the device and `ENERGY` of the device."""
        nodes, sizes = len(self.graph.nodes), {**self.device.tensors, **self.device.inputs}
        asks, here = self.leaving.reach[-1], self.pieces()
        reach = np.full(nodes, asks)
        for share, piece in zip(self.leaving.reach, here, strict=True):
            reach[list(piece)] = share
        down_ms = np.zeros(nodes)  # of outputs that the cloud makes
        ms = np.stack([np.array(self.device.nodes_ms) * reach, np.array(self.cloud.nodes_ms) * asks])
        for piece in here[:-1]:
            ms[CLOUD, list(piece)] = np.inf
        for name in self.graph.outputs:
            at = self.graph.made_by(name)
            if at >= 0:
                back_ms = asks * self.rate.down_ms(sizes[name].bytes) if travels(sizes, name) else np.inf
                down_ms[at] += back_ms
        ms[CLOUD] += down_ms
        flows = []
        for tensor in self.graph.tensors:
            sent_ms = self._sent_ms(sizes, tensor.name)
            flows.append(Flow(tensor.producer, tensor.consumers, (asks * sent_ms if sent_ms < np.inf else np.inf,)))
        trip = asks * (self.rate.trip_ms + self.rate.up_ms(MESSAGE) + self.rate.down_ms(MESSAGE) + self.cloud_ms)
        use = {MEMORY: weights_use(self.graph, self.device, 2)}
        if self.device_watts or self.radio_watts:
            spent = np.zeros((2, nodes))
            spent[DEVICE] = ms[DEVICE] * self.device_watts * 1e-3
            spent[CLOUD] = np.where(np.isfinite(down_ms), down_ms, 0.0) * self.radio_watts * 1e-3
            use[ENERGY] = Use(spent, np.array([self.radio_watts * 1e-3]))
        waits = (asks * (self.rate.trip_ms + self.cloud_ms),)
        return Network(ms, tuple(flows), (trip,), use, waits, np.where(np.isfinite(down_ms), down_ms, 0.0))

    @property
    def odd(self) -> str:
        """An output of nodes that is no array of numbers, "" where there is none."""
        known = self.device.tensors
        made = (name for name in self.graph.outputs if self.graph.made_by(name) >= 0)
        return next((name for name in made if not travels(known, name)), "")

    def crossing(self, cut: Cut) -> list[str]:
        """Names of the tensors that travel up."""
        return self.graph.crossing([at for at, tier in enumerate(cut.tiers) if tier == DEVICE])

    def pieces(self) -> list[set[int]]:
        """Numbers of the nodes up to each exit, and of all others."""
        left, found = set(range(len(self.graph.nodes))), list[set[int]]()
        for nodes in self.leaving.nodes:
            found.append(left & nodes)
            left -= nodes
        return [*found, left]

    def up_bytes(self, cut: Cut) -> float:
        """What travels up for an input that is asked about; 0 where all stays on the device."""
        if max(cut.tiers) == DEVICE:
            return 0.0
        sizes = {**self.device.tensors, **self.device.inputs}
        return MESSAGE + sum(self.codec.size(self._known(sizes, name)) for name in self.crossing(cut))

    def energy_j(self, device_ms: float, link_ms: float) -> float:
        """What the device spends on an input."""
        return (device_ms * self.device_watts + link_ms * self.radio_watts) * 1e-3

    def _sent_ms(self, sizes: Mapping[str, TensorSize], name: str) -> float:
        if not travels(sizes, name):
            return np.inf
        return self.rate.up_ms(self.codec.size(sizes[name])) + self.codec.work_ms(sizes[name])

    def _known(self, sizes: Mapping[str, TensorSize], name: str) -> TensorSize:
        if name not in sizes:
            raise PlanError(f"the size of {name!r} is not known", "measure the profile again")
        return sizes[name]


def weights_use(graph: Graph, device: Profile, tiers: int) -> Use:
    """What a way takes of `MEMORY`: weights on the device; what several nodes use is there once."""
    held = np.zeros((tiers, len(graph.nodes)))
    held[DEVICE] = np.array(device.weights) / 1e6
    shared = [Shared(nodes, size / 1e6) for nodes, size in graph.shared_weights]
    for nodes, amount in shared:
        held[DEVICE, list(nodes)] -= amount
    held[DEVICE] = held[DEVICE].clip(0.0)  # of rounding
    return Use(held, np.zeros(tiers - 1), tuple(shared))


def travels(sizes: Mapping[str, TensorSize], name: str) -> bool:
    """Whether it is a tensor of numbers; sequences, maps and texts stay where they are."""
    return name in sizes and sizes[name].dtype in DTYPES
