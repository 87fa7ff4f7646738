"""Counters of a service, and their text for Prometheus (exposition format 0.0.4, in seconds, bytes and tokens)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.013, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("bounds", "count", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.count += 1


@dataclass(slots=True)
class ModeMetrics:
    """What devices that work in one mode ask for, and how soon they are answered.

    Attributes:
        requests, bytes_in: rows, streams, drafts and rows sent ahead; their size.
        first_s: from a request with more rows than a decode step has to its first token.
        token_s: each token after that: since the one before in a stream, since it was asked for otherwise; of a draft
            its time by the tokens that it gave.
    """

    requests: int = 0
    bytes_in: int = 0
    first_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    token_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))


@dataclass(frozen=True, slots=True)
class Gauge:
    """What is true now.

    Attributes:
        values: by label's value; the empty one stands for none.
    """

    help: str
    values: Mapping[str, float]
    label: str = ""


class Metrics:
    """What a service counts; the thread that has the connections writes, the HTTP thread reads.

    Attributes:
        messages, bytes_in, bytes_out: on all connections.
        malformed: messages that broke the protocol.
        faults: refusals by code name.
        rows, tokens: computed and sampled.
        sessions_opened, sessions_evicted, sessions_expired: over the service's life.
        prefix_asked, prefix_found: tokens that sessions wanted to begin with, and those whose KV was there.
        step_s, step_rows, step_sequences, queue_s: of the engine's steps, and requests' waiting for them.
        modes: by the mode in which devices work.
        gauges: what is true now, by name; set by the service.
    """

    def __init__(self) -> None:
        self.messages = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.malformed = 0
        self.rows = 0
        self.tokens = 0
        self.sessions_opened = 0
        self.sessions_evicted = 0
        self.sessions_expired = 0
        self.peers_dropped = 0
        self.prefix_asked = 0
        self.prefix_found = 0
        self.faults: dict[str, int] = {}
        self.step_s = Histogram(_SECONDS)
        self.step_rows = Histogram(_COUNTS)
        self.step_sequences = Histogram(_COUNTS)
        self.queue_s = Histogram(_SECONDS)
        self.modes: dict[str, ModeMetrics] = {}
        self.gauges: Mapping[str, Gauge] = {}

    def fault(self, name: str) -> None:
        """Counts a refusal."""
        self.faults[name] = self.faults.get(name, 0) + 1

    def mode(self, name: str) -> ModeMetrics:
        """What is counted of that mode."""
        if (found := self.modes.get(name)) is None:
            found = self.modes[name] = ModeMetrics()
        return found

    def text(self) -> str:
        """All of it for Prometheus."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, value, help in (
            ("messages", self.messages, "Messages received"),
            ("malformed_messages", self.malformed, "Messages that broke the protocol"),
            ("rows", self.rows, "Rows computed"),
            ("tokens", self.tokens, "Tokens sampled"),
            ("sessions_opened", self.sessions_opened, "Sessions opened"),
            ("sessions_evicted", self.sessions_evicted, "Sessions whose KV was taken for others"),
            ("sessions_expired", self.sessions_expired, "Sessions forgotten after idling"),
            ("prefix_asked_tokens", self.prefix_asked, "Tokens that sessions wanted to begin with"),
            ("prefix_found_tokens", self.prefix_found, "Tokens of those whose KV was there"),
            ("peers_dropped", self.peers_dropped, "Connections dropped for silence or unread answers"),
        ):
            yield from _counter(name, help, [((), value)])
        both = [((("direction", "in"),), self.bytes_in), ((("direction", "out"),), self.bytes_out)]
        yield from _counter("bytes", "Payload bytes on all connections", both)
        refused = [((("code", code),), count) for code, count in sorted(self.faults.copy().items())]
        yield from _counter("faults", "Refused requests", refused)
        modes = [((("mode", name),), mode) for name, mode in sorted(self.modes.copy().items())]
        yield from _counter("requests", "Requests of devices", [(of, mode.requests) for of, mode in modes])
        yield from _counter("request_bytes", "Payload bytes of them", [(of, mode.bytes_in) for of, mode in modes])
        for name, help, each in (
            ("time_to_first_token_seconds", "From a prompt to its first token", [(of, m.first_s) for of, m in modes]),
            ("time_per_output_token_seconds", "Each token after that", [(of, m.token_s) for of, m in modes]),
            ("queue_seconds", "Requests' waiting for the engine", [((), self.queue_s)]),
            ("step_seconds", "A step of the engine", [((), self.step_s)]),
            ("step_rows", "Rows in it", [((), self.step_rows)]),
            ("step_sequences", "Sequences in it: the batch", [((), self.step_sequences)]),
        ):
            yield from _histogram(name, help, each)
        for name, gauge in self.gauges.items():
            yield from _head(name, gauge.help, "gauge")
            for of, level in gauge.values.items():
                yield f"isthmus_{name}{_shown(((gauge.label, of),) if gauge.label else ())} {level:g}"


def _head(name: str, help: str, kind: str) -> Iterator[str]:
    yield f"# HELP isthmus_{name} {help}."
    yield f"# TYPE isthmus_{name} {kind}"


def _counter(name: str, help: str, values: Iterable[tuple[_Labels, float]]) -> Iterator[str]:
    yield from _head(f"{name}_total", help, "counter")
    for labels, value in values:
        yield f"isthmus_{name}_total{_shown(labels)} {value}"


def _histogram(name: str, help: str, each: Iterable[tuple[_Labels, Histogram]]) -> Iterator[str]:
    yield from _head(name, help, "histogram")
    for labels, histogram in each:
        total = 0
        for bound, count in zip((*map("{:g}".format, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            total += count
            yield f"isthmus_{name}_bucket{_shown((*labels, ('le', bound)))} {total}"
        yield f"isthmus_{name}_sum{_shown(labels)} {histogram.sum:g}"
        yield f"isthmus_{name}_count{_shown(labels)} {total}"


def _shown(labels: _Labels) -> str:
    each = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    inside = ",".join(f'{name}="{value}"' for name, value in each)
    return f"{{{inside}}}" if inside else ""
