"""Every way to share an ONNX model between a device and a cloud, with its costs: the rows of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from isthmus.protocol.errors import PlanError
from isthmus.split.budget import LATENCY, Aim, best, taken
from isthmus.split.cut import Cut, Network, fastest, priced
from isthmus.split.onnx_network import CLOUD, DEVICE, ENERGY, MEMORY, Codec, Sharing
from isthmus.split.plan import Kind, Row

PLAIN = Codec("as it is")
FINALISTS = 4  # splits of a codec that are measured as really fused models
_UNITS = {LATENCY: "ms", MEMORY: "MB on the device", ENERGY: "J"}


@dataclass(frozen=True)
class Wanted:
    """What a plan is for.

    Attributes:
        aim: the least time for one input, or the most inputs a second through a pipeline.
        budgets: the most that may be taken, by resource.
    """

    aim: Aim = "latency"
    budgets: Mapping[str, float] = field(default_factory=dict)


def ways(sharing: Sharing, codecs: Sequence[Codec], wanted: Wanted) -> list[Row]:
    """All on the device, all in the cloud, and the best splits of each codec, the best first.

    Raises:
        PlanError: no way keeps to the budgets (which, and by how much).
    """
    plain = replace(sharing, codec=PLAIN)
    network, nodes = plain.network(), len(sharing.graph.nodes)
    best(network, wanted.aim, wanted.budgets)  # says which budget is impossible, by how much
    found = [
        _row(plain, priced(network, [DEVICE] * nodes), "device", "all on the device", wanted),
        _row(plain, priced(network, [CLOUD] * nodes), "cloud", "the input to the cloud", wanted),
    ]
    for codec in codecs:
        one = replace(sharing, codec=codec)
        found += [_row(one, cut, "split", _named(one, cut), wanted) for cut in splits(one, wanted)]
    return found


def splits(sharing: Sharing, wanted: Wanted, count: int = FINALISTS) -> list[Cut]:
    """The best ways that have nodes on both sides, of all there are and of those that cut the order of nodes once."""
    network = sharing.network()
    nodes = network.tasks
    found: dict[tuple[int, ...], Cut] = {}
    for cut in _optima(network, wanted):
        found[cut.tiers] = cut
    for end in range(1, nodes):
        cut = priced(network, [DEVICE] * end + [CLOUD] * (nodes - end))
        found.setdefault(cut.tiers, cut)
    given = set(sharing.graph.inputs)
    real = [cut for cut in found.values() if len(set(cut.tiers)) > 1 and not set(sharing.crossing(cut)) <= given]
    kept: dict[tuple[str, ...], Cut] = {}
    for cut in sorted(real, key=lambda one: (bool(_fails(one, wanted)), _value(one, wanted))):
        kept.setdefault(tuple(sharing.crossing(cut)), cut)  # the same tensors travel: the better one is enough
    return list(kept.values())[:count]


def _optima(network: Network, wanted: Wanted) -> Iterator[Cut]:
    yield fastest(network)
    try:
        yield best(network, wanted.aim, wanted.budgets)
    except PlanError:
        return


def remeasured(rows: Sequence[Row], fused: Mapping[tuple[int, ...], tuple[float, float]]) -> list[Row]:
    """Rows with what their parts take as really fused models.

    Args:
        fused: milliseconds of the device's and of the cloud's part, by the nodes on the device.
    """
    found = []
    for row in rows:
        if row.device in fused:
            device_ms, cloud_ms = fused[row.device]
            ms = row.ms - row.device_ms - row.cloud_ms + device_ms + cloud_ms
            row = msgspec.structs.replace(row, device_ms=device_ms, cloud_ms=cloud_ms, ms=ms)
        found.append(row)
    return found


def _row(sharing: Sharing, cut: Cut, kind: Kind, name: str, wanted: Wanted) -> Row:
    here = tuple(at for at, tier in enumerate(cut.tiers) if tier == DEVICE)
    down = sum(
        sharing.device.tensors[output].bytes
        for output in sharing.graph.outputs
        if (made := sharing.graph.made_by(output)) >= 0 and cut.tiers[made] == CLOUD
    )
    down_ms = sharing.rate.down_ms(down)
    return Row(
        name=name,
        kind=kind,
        codec=sharing.codec.name if kind == "split" else "",
        device=here,
        crossing=tuple(sharing.crossing(cut)) if len(here) < len(cut.tiers) else (),
        device_ms=cut.stages[DEVICE],
        cloud_ms=cut.stages[CLOUD] - down_ms,
        link_ms=cut.links[0] + down_ms,
        up_bytes=sharing.up_bytes(cut),
        down_bytes=float(down),
        ms=cut.ms,
        fails=_fails(cut, wanted),
    )


def _named(sharing: Sharing, cut: Cut) -> str:
    names = sharing.crossing(cut)
    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"split after {shown}, {sharing.codec.name}"


def _fails(cut: Cut, wanted: Wanted) -> str:
    over = [
        f"{taken(cut, name):.4g} {_UNITS.get(name, name)}, {most:.4g} wanted"
        for name, most in wanted.budgets.items()
        if taken(cut, name) > most * (1 + 1e-6)
    ]
    return "; ".join(over)


def _value(cut: Cut, wanted: Wanted) -> float:
    return cut.ms if wanted.aim == "latency" else cut.slowest_ms
