"""A link as a plan takes it: a round trip, and each way's rate or the trace of one; from words or from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from isthmus.protocol.errors import PlanError
from isthmus.split.files import write_whole
from isthmus.split.onnx_network import Rate
from isthmus.split.profile import load
from isthmus.split.traces import Trace, mean_rate, named_pair

_EXAMPLES = "write it as rtt=20,up=5,down=20 (ms and Mbit/s), rtt=20,trace=PREFIX, or name a link's .json file"
_WORDS = ("rtt", "up", "down", "rate", "trace")


@dataclass(frozen=True)
class Link:
    """A link over time.

    Attributes:
        trip_ms: there and back, of a message without weight.
        up, down: a trace, or bits per second where it does not change.
    """

    trip_ms: float
    up: Trace | float
    down: Trace | float

    def rate(self) -> Rate:
        """It in the mean, as a search takes it.

        Raises:
            PlanError: it never delivers.
        """
        up, down = (mean_rate(way) if isinstance(way, Trace) else way for way in (self.up, self.down))
        return Rate(self.trip_ms, up, down)

    @property
    def changes(self) -> bool:
        """Whether it is not the same at all times."""
        return isinstance(self.up, Trace) or isinstance(self.down, Trace)

    @property
    def words(self) -> str:
        """It, for people."""
        rate = self.rate()
        told = f"a round trip of {self.trip_ms:g} ms, {_rate(rate.up_bps)} Mbit/s up and {_rate(rate.down_bps)} down"
        return f"{told} in the mean of a trace" if self.changes else told


class Served(msgspec.Struct, frozen=True):
    """What a language model takes in the cloud at a link's other end, as that cloud says.

    Attributes:
        model: its model_id.
        rows_ms: (n, ms) of a step of n rows that gives n tokens.
        prefill_row_ms: of one row of a prompt, 0 where the cloud does not say.
    """

    model: str
    name: str
    rows_ms: tuple[tuple[int, float], ...]
    prefill_row_ms: float

    def __post_init__(self) -> None:
        times = [ms for _, ms in self.rows_ms]
        if not times or not all(0 < ms < math.inf for ms in times) or not 0 <= self.prefill_row_ms < math.inf:
            raise PlanError(f"the link's cloud has no times of {self.name[:80]!r}", "measure it again")


class LinkFile(msgspec.Struct, frozen=True):
    """A link that was measured, as its file has it; rates in 10^6 bit/s.

    Attributes:
        served: language models of the cloud that it was measured with, those that are timed.
    """

    rtt_ms: float
    up_mbps: float
    down_mbps: float
    format: str = "isthmus-link"
    served: tuple[Served, ...] = ()

    def __post_init__(self) -> None:
        if self.format != "isthmus-link":
            raise PlanError("the file is no link", _EXAMPLES)

    def save(self, path: Path) -> None:
        """Writes it, as JSON for people to read as well."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def read_link(text: str) -> Link:
    """A link from words, as rtt=20,up=5,down=20 or rtt=20,trace=PREFIX, or from a .json file.

    Raises:
        PlanError: the words say no link, or one that never delivers.
        TraceError: a trace cannot be read.
    """
    if text.endswith(".json"):
        file = read_link_file(Path(text))
        found = Link(file.rtt_ms, file.up_mbps * 1e6, file.down_mbps * 1e6)
    else:
        found = _of_words(text)
    found.rate()
    return found


def read_link_file(path: Path) -> LinkFile:
    """A link that was measured.

    Raises:
        PlanError: the file cannot be read, or holds none.
    """
    return load(path, LinkFile, "link", _EXAMPLES)


def _of_words(text: str) -> Link:
    told = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name.strip() not in _WORDS or not value or name.strip() in told:
            raise PlanError(f"{word!r} says nothing of a link", _EXAMPLES)
        told[name.strip()] = value.strip()
    ways = {name for name in told if name != "rtt"}
    if "rtt" not in told or ways not in ({"up", "down"}, {"rate"}, {"trace"}):
        raise PlanError(f"the link {text!r} lacks a round trip or a rate, or has two", _EXAMPLES)
    trip_ms = _number("rtt", told["rtt"])
    if "trace" in told:
        return Link(trip_ms, *named_pair(told["trace"]))
    up, down = (_number(name, told[name]) * 1e6 for name in (("rate", "rate") if "rate" in told else ("up", "down")))
    return Link(trip_ms, up, down)


def _rate(bps: float) -> str:
    return f"{bps / 1e6:.3g}" if bps < 1e9 else f"{bps / 1e6:.0f}"


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"the link's {name} is {text!r}", _EXAMPLES)
    return number
