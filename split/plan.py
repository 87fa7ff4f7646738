"""The plan of sharing one network between a device and a cloud: every way's costs, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from isthmus.protocol.errors import PlanError
from isthmus.protocol.features import UNIT
from isthmus.split.agreement import Agree
from isthmus.split.budget import Aim
from isthmus.split.files import write_whole
from isthmus.split.graph_manifest import GraphExit
from isthmus.split.pictures import Preprocess
from isthmus.split.profile import TensorSize, load
from isthmus.split.transform import Transform

VERSION = 1
_AGAIN = "plan again: isthmus plan"
_NAME_CHARS = 60  # of a tensor, for people
_DIGITS = 6  # of a row's number
_ROUNDING = 1e-9  # of shares that come to 1
Kind = Literal["device", "cloud", "image", "split"]
Way = tuple[tuple[int, ...], tuple[str, ...]]


class Leaves(msgspec.Struct, frozen=True):
    """Inputs that leave at an exit on the device.

    Attributes:
        share: of all inputs.
        ms: of the device until then.
    """

    exit: GraphExit
    share: float
    ms: float


class Row(msgspec.Struct, frozen=True):
    """One way, with its times in milliseconds and its bytes for one input; on average, where some leave at an exit.

    Attributes:
        kind: all on the device; all in the cloud, which is sent the input, or the image that it was made of; or a
            split.
        codec: how tensors travel.
        device: numbers of the nodes on the device.
        crossing: names of the tensors that travel up.
        device_ms, cloud_ms: computing, coding included.
        link_ms: both ways; `down_ms` the way back alone.
        up_bytes, down_bytes: on the wire.
        ms: from input to output, as predicted.
        tail_ms: the plan's percentile over a changing link and a busy cloud, None where neither is given.
        device_mb: of weights on the device.
        energy_j: that the device spends, 0 where no watts are declared.
        agreement: share of inputs with the unsplit model's answer, None where no inputs were given.
        fails: what it does not keep to, "" if nothing.
        broken: why it cannot be run at all, "" where it can.
        proven: whether no other split is better; else its search was ended before it knew.
        wait_ms: of `link_ms`, in which nothing is on the wire: the round trip.
        transforms: of tensors that travel, before they are coded.
        leaves: at exits, in the order in which they are reached.
        edge: numbers of the nodes on an edge server between device and cloud, empty where there is none.
        edge_ms: computing there.
        beyond: names of the tensors that travel on from there to the cloud, of a way over three machines.
    """

    name: str
    kind: Kind
    codec: str
    device: tuple[int, ...]
    crossing: tuple[str, ...]
    device_ms: float
    cloud_ms: float
    link_ms: float
    up_bytes: float
    down_bytes: float
    ms: float
    tail_ms: float | None = None
    down_ms: float = 0.0
    device_mb: float = 0.0
    energy_j: float = 0.0
    agreement: float | None = None
    fails: str = ""
    transforms: tuple[Transform, ...] = ()
    leaves: tuple[Leaves, ...] = ()
    broken: str = ""
    wait_ms: float = 0.0
    proven: bool = True
    edge: tuple[int, ...] = ()
    edge_ms: float = 0.0
    beyond: tuple[str, ...] = ()

    @property
    def three(self) -> bool:
        """Whether an edge server runs some nodes, and a cloud behind it others."""
        return bool(self.edge and self.beyond)

    @property
    def goes_on(self) -> float:
        """The share of inputs that leave at no exit."""
        left = 1.0 - sum(one.share for one in self.leaves)
        return left if left > _ROUNDING else 0.0

    @property
    def way(self) -> Way:
        """What parts it has: nodes on the device, and exits there."""
        return self.device, tuple(one.exit.output for one in self.leaves)

    def cost_ms(self, aim: Aim) -> float:
        """What is to be small: its time, or in a pipeline that of its slowest stage."""
        if aim == "latency":
            return self.ms
        return max(self.device_ms, self.link_ms - self.wait_ms - self.down_ms, self.cloud_ms, self.down_ms)


class Plan(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        model: the sha256 of the model and its weights.
        nodes: that it has.
        link: in words.
        percentile: that `tail_ms` of the rows is.
        inputs: that the model was profiled with.
        tried: inputs that codecs were chosen on, by which `agreement` of the rows is, too.
        agree: when an answer counts as the same; see `agreement.share`.
        preprocess: what was done with pictures to make them.
        best: which of `rows`.
        verdict: in one sentence.
    """

    model: str
    name: str
    nodes: int
    link: str
    rows: tuple[Row, ...]
    best: int
    verdict: str
    aim: Aim = "latency"
    percentile: float = 95.0
    inputs: dict[str, TensorSize] = {}
    tried: int = 0
    agree: Agree = "top1"
    preprocess: Preprocess | None = None
    format: Literal["isthmus-plan"] = "isthmus-plan"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise PlanError(f"the plan has version {self.version}, this isthmus reads {VERSION}", _AGAIN)
        if not 0 <= self.best < len(self.rows):
            raise PlanError("the plan names no way", _AGAIN)
        for row in self.rows:
            if any(not 0 <= node < self.nodes for node in (*row.device, *row.edge)) or set(row.device) & set(row.edge):
                raise PlanError(f"the plan's way {row.name!r} has a node that the model has not", _AGAIN)
            if (row.codec == UNIT) != bool(row.transforms):
                raise PlanError(f"the plan's way {row.name!r} lacks its codec or its transforms", _AGAIN)

    def split(self, name: str = "") -> Row:
        """A way that cuts the model, the best; or one of that name, which may have all of it in the cloud, too.

        Args:
            name: or the row's number, from 1 on.

        Raises:
            PlanError: there is none.
        """
        if name.isdecimal() and len(name) <= _DIGITS and 1 <= int(name) <= len(self.rows):
            name = self.rows[int(name) - 1].name
        ways = [row for row in self.rows if row.kind == "split" and name in ("", row.name)]
        ways += [row for row in self.rows if row.kind in ("cloud", "image") and name == row.name]
        if not ways:
            known = "; ".join(f"{at}. {row.name}" for at, row in enumerate(self.rows, 1) if row.kind != "device")
            what = (
                f"the plan has no way {name!r} that cuts the model" if name else "the plan has no way to cut the model"
            )
            raise PlanError(what, f"it has: {known}" if known else "keep it on the device")
        return min(ways, key=lambda row: (bool(row.fails), row.cost_ms(self.aim)))

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def load_plan(path: Path) -> Plan:
    """A plan from a file.

    Raises:
        PlanError: it cannot be read, holds none, or one of another version.
    """
    return load(path, Plan, "plan", _AGAIN)


def choose(rows: Sequence[Row], aim: Aim = "latency") -> int:
    """The best of those that keep to what was asked for.

    Raises:
        PlanError: none does (what each of them breaks).
    """
    able = [at for at, row in enumerate(rows) if not row.fails]
    if not able:
        why = "; ".join(dict.fromkeys(row.fails for row in rows))
        raise PlanError(f"no way keeps to what was asked for: {why}", "ask for less, or change the link")
    return min(able, key=lambda at: (rows[at].cost_ms(aim), rows[at].up_bytes))


def verdict(rows: Sequence[Row], best: int, aim: Aim = "latency") -> str:
    """Which way is best, and by how much, in one sentence."""
    row = rows[best]
    others = [one for at, one in enumerate(rows) if at != best and not one.fails and one.kind != row.kind]
    if row.kind == "device":
        told = f"Do not share it: all on the device takes {_told(row, aim)}"
    elif row.kind == "split":
        told = f"Split it after {shown(row.crossing)} ({row.codec}): {_told(row, aim)}"
    else:
        told = f"Do not split it, but send what it is given to the cloud ({row.name}): {_told(row, aim)}"
    if not row.proven:
        told += " (the search ended before it was proven that no other cut is better)"
    if row.leaves:
        told += f" on average, as {1.0 - row.goes_on:.0%} of inputs leave at an exit"
    if not others:
        return told + "."
    second = min(others, key=lambda one: one.cost_ms(aim))
    return f"{told}, against {_told(second, aim)} of the next best, {second.name}."


def _told(row: Row, aim: Aim) -> str:
    return f"{row.cost_ms(aim):.3g} ms" + ("" if aim == "latency" else " an input")


def shown(names: Sequence[str]) -> str:
    """The first of some tensors, for people: short, and nothing that a terminal would obey."""
    found = ["".join(letter if letter.isprintable() else "?" for letter in name[:_NAME_CHARS]) for name in names[:2]]
    return ", ".join(found) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
