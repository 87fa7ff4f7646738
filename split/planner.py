"""Every way to share an ONNX model between a device and a cloud, with its costs: the rows of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median

import msgspec
import numpy as np

from isthmus.protocol.errors import PlanError
from isthmus.protocol.limits import LIMITS
from isthmus.split.budget import LATENCY, Aim, best, taken
from isthmus.split.cut import Cut, Network, fastest, priced
from isthmus.split.finalists import Fused
from isthmus.split.graph_exits import NONE, Leaving
from isthmus.split.onnx_network import CLOUD, DEVICE, ENERGY, MEMORY, MESSAGE, Codec, Sharing
from isthmus.split.pictures import called
from isthmus.split.plan import Kind, Leaves, Row, shown
from isthmus.split.trials import Tried

PLAIN = Codec("as it is")
WORTH_A_TRIAL = (6.0, 3.0, 1.5)  # bits a value: about what int8, int4 and int2 take
STANDS_OUT = 1.15  # times that a way may take more than predicted, beside what the others do
_ROUNDING = 1e-9
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


def ways(sharing: Sharing, codecs: Sequence[Codec], wanted: Wanted, choices: Sequence[Leaving] = ()) -> list[Row]:
    """All on the device, all in the cloud, and the best splits of each codec, the best first; then the best ways with
    exits, of all choices of them.

    Raises:
        PlanError: no way keeps to the budgets (which, and by how much).
    """
    plain = replace(sharing, codec=PLAIN)
    network, nodes = plain.network(), len(sharing.graph.nodes)
    try:
        best(network, wanted.aim, wanted.budgets)  # says which budget is impossible, by how much
    except PlanError:
        if not any(_possible(replace(plain, leaving=one).network(), wanted) for one in choices):
            raise
    found = [
        _row(plain, priced(network, [DEVICE] * nodes), "device", "all on the device"),
        _row(plain, priced(network, [CLOUD] * nodes), "cloud", "the input to the cloud"),
    ]
    for codec in codecs:
        one = replace(sharing, codec=codec)
        found += [_row(one, cut, "split", _named(one, cut)) for cut in splits(one, wanted)]
    early = list[Row]()
    for leaving in choices:
        plain = replace(plain, leaving=leaving)
        name = _called("all on the device", [one.output for one in leaving.exits])
        early.append(_row(plain, priced(plain.network(), [DEVICE] * nodes), "device", name))
        for one in (replace(plain, codec=codec) for codec in codecs):
            early += [_row(one, cut, "split", _named(one, cut)) for cut in splits(one, wanted)]
    found = [judged(row, wanted) for row in found if np.isfinite(row.ms)]
    return found + _best([judged(row, wanted) for row in early if np.isfinite(row.ms)], wanted.aim)


def candidates(sharing: Sharing, wanted: Wanted, choices: Sequence[Leaving] = ()) -> list[Row]:
    """Splits that would be best if what travels were smaller, with their costs as it is: they are worth a trial."""
    found = list[Row]()
    for leaving in (NONE, *choices):
        plain = replace(sharing, codec=PLAIN, leaving=leaving)
        network = plain.network()
        tiers = dict.fromkeys(cut.tiers for bits in WORTH_A_TRIAL for cut in splits(_coding(plain, bits), wanted))
        cuts = [priced(network, list(one)) for one in tiers]
        rows = [_row(plain, cut, "split", _named(plain, cut)) for cut in cuts if np.isfinite(cut.ms)]
        found += _best(rows, wanted.aim) if leaving.exits else rows
    return found


def coded(row: Row, sharing: Sharing, tried: Tried, faster: tuple[float, float]) -> Row:
    """A split, or a picture in place of the input, in a codec that was tried.

    Args:
        row: the same with what travels as it is.
        faster: how many times longer things take on the device, and in the cloud, than where it was tried.
    """
    device_ms = row.device_ms + row.goes_on * tried.encode_ms * faster[DEVICE]
    cloud_ms = row.cloud_ms + row.goes_on * tried.decode_ms * faster[CLOUD]
    up_bytes = row.goes_on * (tried.bytes + MESSAGE)
    link_ms = row.link_ms + sharing.rate.up_ms(up_bytes - row.up_bytes)
    picture, name = row.kind == "cloud", f"split after {shown(row.crossing)}, {tried.codec}"
    if picture:
        name = f"the picture as {called(tried.codec)}"
    return msgspec.structs.replace(
        row,
        name=_called(name, row.way[1]),
        kind="image" if picture else "split",
        codec=tried.codec,
        device_ms=device_ms,
        cloud_ms=cloud_ms,
        link_ms=link_ms,
        up_bytes=up_bytes,
        ms=device_ms + link_ms + cloud_ms,
        energy_j=sharing.energy_j(device_ms, link_ms),
        agreement=tried.agreement,
        transforms=tried.transforms,
    )


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """Rows of which no two have one name: the first tensors of two cuts may be the same."""
    counts: Counter[str] = Counter()
    found = []
    for row in rows:
        counts[row.name] += 1
        again = counts[row.name] > 1
        found.append(msgspec.structs.replace(row, name=f"{row.name} ({counts[row.name]})") if again else row)
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
    if not sharing.leaving.reach[-1]:
        return []  # nothing gets as far
    given = set(sharing.graph.inputs)
    real = [cut for cut in found.values() if len(set(cut.tiers)) > 1 and np.isfinite(cut.ms)]
    kept: dict[tuple[str, ...], Cut] = {}
    for cut in sorted(real, key=lambda one: (_over(one, wanted), _value(one, wanted))):
        crossing = tuple(sharing.crossing(cut))
        if not set(crossing) <= given:
            kept.setdefault(crossing, cut)  # the same tensors travel: the better one is enough
        if len(kept) == count:
            break
    return list(kept.values())


def _possible(network: Network, wanted: Wanted) -> bool:
    try:
        best(network, wanted.aim, wanted.budgets)
    except PlanError:
        return False
    return True


def _optima(network: Network, wanted: Wanted) -> Iterator[Cut]:
    yield fastest(network)
    try:
        yield best(network, wanted.aim, wanted.budgets)
    except PlanError:
        return


def remeasured(rows: Sequence[Row], sharing: Sharing, timed: Callable[[Row], Fused | None]) -> list[Row]:
    """Rows with what their parts take as really fused models; what takes unlike the others is timed once more.

    Args:
        timed: gives that, None for a row without parts; raises a PlanError where they do not run by themselves.
    """
    found = dict[int, Row]()
    for at, row in enumerate(rows):
        try:
            if (took := timed(row)) is not None:
                found[at] = _refined(row, sharing, took)
        except PlanError as error:
            found[at] = msgspec.structs.replace(row, broken=f"its parts do not run by themselves: {error.problem}")
    runs = [at for at, row in found.items() if not row.broken]
    grown = {at: _computes_ms(found[at]) / max(_computes_ms(rows[at]), _ROUNDING) for at in runs}
    usual = median(grown.values()) if grown else 0.0
    for at in [at for at, times in grown.items() if times > STANDS_OUT * usual]:
        if (took := timed(rows[at])) is not None:  # others of this machine may have been in the way
            found[at] = min(found[at], _refined(rows[at], sharing, took), key=_computes_ms)
    return [found.get(at, row) for at, row in enumerate(rows)]


def _computes_ms(row: Row) -> float:
    return row.device_ms + row.edge_ms + row.cloud_ms


def _refined(row: Row, sharing: Sharing, took: Fused) -> Row:
    """A row with what its parts took."""
    until = list(accumulate(took.stages_ms))
    leaves = tuple(msgspec.structs.replace(one, ms=ms) for one, ms in zip(row.leaves, until, strict=False))
    device_ms = sum(one.share * one.ms for one in leaves) + row.goes_on * until[-1]
    cloud_ms = row.goes_on * took.cloud_ms
    ms, more_j = device_ms + row.link_ms + took.edge_ms + cloud_ms, sharing.energy_j(device_ms - row.device_ms, 0.0)
    times = {"device_ms": device_ms, "edge_ms": took.edge_ms, "cloud_ms": cloud_ms, "ms": ms}
    return msgspec.structs.replace(row, **times, energy_j=row.energy_j + more_j, leaves=leaves)


def judged(row: Row, wanted: Wanted, slo_ms: float | None = None, percentile: float = 0.0, least: float = 0.0) -> Row:
    """A row that says what it does not keep to.

    Args:
        least: agreement with the unsplit model, where that was tried.
        slo_ms: that it may take at most: at that percentile where it varies, else what is expected.
    """
    has = {MEMORY: row.device_mb, ENERGY: row.energy_j, LATENCY: row.ms}
    over = [row.broken] if row.broken else []
    largest, most_bytes = max(row.up_bytes, row.down_bytes) / (row.goes_on or 1.0), LIMITS.max_message_bytes
    if largest > most_bytes:
        over.append(f"{largest / 1e6:.3g} MB travel at once, and a message takes {most_bytes / 1e6:.3g}")
    over += [
        f"{has[name]:.4g} {_UNITS[name]}, {most:.4g} wanted"
        for name, most in wanted.budgets.items()
        if has[name] > most * (1 + 1e-6)
    ]
    late = row.ms if row.tail_ms is None else row.tail_ms
    if slo_ms is not None and late > slo_ms:
        where = "" if row.tail_ms is None else f" at the {percentile:g}th percentile"
        over.append(f"{late:.4g} ms{where}, {slo_ms:.4g} wanted")
    if row.agreement is not None and row.agreement < least:
        over.append(f"{row.agreement:.1%} of answers stay, {least:.1%} wanted")
    return msgspec.structs.replace(row, fails="; ".join(over))


def _row(sharing: Sharing, cut: Cut, kind: Kind, name: str) -> Row:
    here = tuple(at for at, tier in enumerate(cut.tiers) if tier == DEVICE)
    down = sum(
        sharing.device.tensors[output].bytes
        for output in sharing.graph.outputs
        if (made := sharing.graph.made_by(output)) >= 0
        and cut.tiers[made] == CLOUD
        and output in sharing.device.tensors
    )
    leaving, asks = sharing.leaving, sharing.leaving.reach[-1]
    down_ms = asks * sharing.rate.down_ms(down)
    device_ms, link_ms = cut.stages[DEVICE], cut.links[0] + down_ms
    until = accumulate(sum(sharing.device.nodes_ms[at] for at in piece) for piece in sharing.pieces())
    leaves = [Leaves(*one) for one in zip(leaving.exits, leaving.shares, until, strict=False)]
    return Row(
        name=name,
        kind=kind,
        codec=sharing.codec.name if kind == "split" else "",
        device=here,
        crossing=tuple(sharing.crossing(cut)) if len(here) < len(cut.tiers) else (),
        device_ms=device_ms,
        cloud_ms=cut.stages[CLOUD] - down_ms,
        link_ms=link_ms,
        up_bytes=asks * sharing.up_bytes(cut) if np.isfinite(cut.ms) else 0.0,
        down_bytes=float(asks * down),
        ms=cut.ms,
        down_ms=down_ms,
        wait_ms=asks * (sharing.rate.trip_ms + sharing.cloud_ms) if cut.links[0] else 0.0,
        device_mb=cut.use[MEMORY],
        proven=cut.proven,
        broken=f"output {shown([odd])} is no array of numbers" if (odd := sharing.odd) and kind != "device" else "",
        energy_j=sharing.energy_j(device_ms, link_ms),
        agreement=leaving.agreement,
        leaves=tuple(leaves),
    )


def _named(sharing: Sharing, cut: Cut) -> str:
    exits = [one.output for one in sharing.leaving.exits]
    return _called(f"split after {shown(sharing.crossing(cut))}, {sharing.codec.name}", exits)


def _called(what: str, exits: Sequence[str]) -> str:
    """A way's name with those of its exits."""
    return f"{what}, exit at {shown(exits)}" if exits else what


def _best(rows: Sequence[Row], aim: Aim) -> list[Row]:
    """The best all on the device, and as many splits as are measured."""
    ordered = sorted(rows, key=lambda row: (bool(row.fails), row.cost_ms(aim)))
    whole = [row for row in ordered if row.kind == "device"][:1]
    return whole + [row for row in ordered if row.kind == "split"][:FINALISTS]


def _coding(sharing: Sharing, bits: float) -> Sharing:
    return replace(sharing, codec=Codec(f"{bits:g} bits", bits))


def _over(cut: Cut, wanted: Wanted) -> bool:
    """Whether a cut breaks a budget."""
    return any(taken(cut, name) > most * (1 + 1e-6) for name, most in wanted.budgets.items())


def _value(cut: Cut, wanted: Wanted) -> float:
    return cut.ms if wanted.aim == "latency" else cut.slowest_ms
