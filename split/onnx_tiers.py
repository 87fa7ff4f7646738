"""A model over three machines in a row: a device, an edge server near it, and a cloud behind that."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from isthmus.protocol.errors import PlanError
from isthmus.split.budget import best
from isthmus.split.cut import Cut, Flow, Network, Use, priced
from isthmus.split.graph import Graph
from isthmus.split.onnx_network import ENERGY, MEMORY, MESSAGE, Rate, Sharing, travels, weights_use
from isthmus.split.plan import Row, shown
from isthmus.split.planner import Wanted, judged, splits
from isthmus.split.profile import Profile, TensorSize

DEVICE, EDGE, CLOUD = range(3)


@dataclass(frozen=True)
class Tiers:
    """See the module; what travels does so as it is.

    Attributes:
        near, far: the links from the device to the edge server, and from that to the cloud.
        device_watts, radio_watts: of the device, while it computes, and while something travels on the near link.
        service_ms: that a request takes on each link beside nodes and what is on the wire.

    Raises:
        PlanError: a profile is another model's.
    """

    graph: Graph
    device: Profile
    edge: Profile
    cloud: Profile
    near: Rate
    far: Rate
    device_watts: float = 0.0
    radio_watts: float = 0.0
    service_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.device.model == self.edge.model == self.cloud.model:
            raise PlanError("the profiles of device, edge and cloud are of several models", "measure the same file")

    @property
    def through(self) -> Rate:
        """Both links, one after the other, as from the device to the cloud."""
        up, down = (1.0 / (1.0 / one + 1.0 / two) for one, two in self._both)
        return Rate(self.near.trip_ms + self.far.trip_ms, up, down)

    def network(self) -> Network:
        """What is to be cut; budgets are those of `onnx_network.Sharing`."""
        nodes, sizes = len(self.graph.nodes), self._sizes
        ms = np.stack([np.array(one.nodes_ms) for one in (self.device, self.edge, self.cloud)])
        back = np.zeros((3, nodes))  # of outputs, to the device
        for name in self.graph.outputs:
            if (at := self.graph.made_by(name)) >= 0:
                near, far = (
                    link.down_ms(sizes[name].bytes) if travels(sizes, name) else np.inf for link in self._links
                )
                back[EDGE, at] += near
                back[CLOUD, at] += near + far
        flows = [
            Flow(
                one.producer,
                one.consumers,
                tuple(
                    link.up_ms(sizes[one.name].bytes) if travels(sizes, one.name) else np.inf for link in self._links
                ),
            )
            for one in self.graph.tensors
        ]
        waits = tuple(link.trip_ms + self.service_ms for link in self._links)
        trips = tuple(
            ms + link.up_ms(MESSAGE) + link.down_ms(MESSAGE) for ms, link in zip(waits, self._links, strict=True)
        )
        use: dict[str, Use] = {MEMORY: weights_use(self.graph, self.device, 3)}
        if self.device_watts or self.radio_watts:
            spent = np.zeros((3, nodes))
            spent[DEVICE] = ms[DEVICE] * self.device_watts * 1e-3
            for tier in (EDGE, CLOUD):
                outputs = {self.graph.made_by(name) for name in self.graph.outputs} - {-1}
                for at in outputs:
                    near_ms = back[EDGE, at] if np.isfinite(back[EDGE, at]) else 0.0
                    spent[tier, at] = near_ms * self.radio_watts * 1e-3
            use[ENERGY] = Use(spent, np.array([self.radio_watts * 1e-3, 0.0]))
        return Network(ms + back, tuple(flows), trips, use, waits)

    def row(self, cut: Cut) -> Row:
        """A way, with its costs."""
        here, near = (tuple(at for at, tier in enumerate(cut.tiers) if tier == one) for one in (DEVICE, EDGE))
        last = max(cut.tiers, default=DEVICE)
        crossing = self.graph.crossing(here) if last > DEVICE else []
        beyond = self.graph.crossing((*here, *near)) if last > EDGE else []
        sizes, outputs = self._sizes, [one for one in self.graph.outputs if self.graph.made_by(one) >= 0]
        tiers = {one: cut.tiers[self.graph.made_by(one)] for one in outputs}
        known = {one: sizes[one].bytes for one in (*outputs, *crossing, *beyond) if one in sizes}
        down = sum(known.get(one, 0) for one in outputs if tiers[one] > DEVICE)
        further = sum(known.get(one, 0) for one in outputs if tiers[one] > EDGE)
        down_ms = self.near.down_ms(down) + self.far.down_ms(further)
        own = [
            sum(profile.nodes_ms[at] for at, tier in enumerate(cut.tiers) if tier == one)
            for one, profile in enumerate((self.device, self.edge, self.cloud))
        ]
        up = sum(known.get(one, 0) for one in crossing)
        radio_ms = cut.links[0] + self.near.down_ms(down)
        return Row(
            name=_called(here, near, last, crossing, beyond),
            kind="device" if last == DEVICE else "split" if here or (near and beyond) else "cloud",
            codec="as it is" if here or near else "",
            device=here,
            crossing=tuple(crossing),
            device_ms=own[DEVICE],
            cloud_ms=own[CLOUD],
            link_ms=sum(cut.links) + down_ms,
            up_bytes=float(MESSAGE + up) if crossing else 0.0,
            down_bytes=float(down),
            ms=cut.ms,
            down_ms=down_ms,
            wait_ms=sum(cut.waits),
            device_mb=cut.use[MEMORY],
            energy_j=(own[DEVICE] * self.device_watts + radio_ms * self.radio_watts) * 1e-3,
            proven=cut.proven,
            edge=near,
            edge_ms=own[EDGE],
            beyond=tuple(beyond),
        )

    @property
    def _links(self) -> tuple[Rate, Rate]:
        return self.near, self.far

    @property
    def _both(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return (self.near.up_bps, self.far.up_bps), (self.near.down_bps, self.far.down_bps)

    @property
    def _sizes(self) -> dict[str, TensorSize]:
        return {**self.device.tensors, **self.device.inputs}


def over_three(tiers: Tiers, near: Sharing, wanted: Wanted) -> list[Row]:
    """The ways that use the edge server: all of it or what follows a cut there, and the best over three machines.

    Args:
        near: the device and the edge server alone.
    """
    network, nodes = tiers.network(), len(tiers.graph.nodes)
    cuts = [priced(network, [EDGE] * nodes)]
    for cut in splits(near, wanted):
        cuts.append(priced(network, [min(tier, EDGE) for tier in cut.tiers]))
    found = [tiers.row(cut) for cut in cuts]
    with suppress(PlanError):  # of budgets, which `ways` has said
        best_ = tiers.row(best(network, wanted.aim, wanted.budgets))
        found += [best_] if best_.three else []
    return [judged(row, wanted) for row in found if np.isfinite(row.ms)]


def _called(here: tuple[int, ...], near: tuple[int, ...], last: int, crossing: list[str], beyond: list[str]) -> str:
    if last == DEVICE:
        return "all on the device"
    to_edge = f"split after {shown(crossing)}" if here else "the input"
    if last == EDGE:
        return f"{to_edge} to the edge server" if not here else f"{to_edge}, the rest on the edge server"
    if not near:
        return f"{to_edge} to the cloud" if not here else f"{to_edge}, the rest in the cloud"
    return f"{to_edge} to the edge server, and after {shown(beyond)} to the cloud"
