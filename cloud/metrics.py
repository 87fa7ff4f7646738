"""Counters of a service, and their text for Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

_STEP_MS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 25.0, 50.0, 100.0, 250.0, 1000.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


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


class Metrics:
    """What a service counts; the thread that has the connections writes, the HTTP thread reads.

    Attributes:
        messages, bytes_in, bytes_out: on all connections.
        malformed: messages that broke the protocol.
        faults: refusals by code name.
        rows, tokens: computed and sampled.
        sessions_opened, sessions_evicted, sessions_expired: over the service's life.
        prefix_asked, prefix_found: tokens that sessions wanted to begin with, and those whose KV was there.
        step_ms, step_rows, queue_ms: of the engine's steps, and requests' waiting for them.
        gauges: what is true now; set by the service.
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
        self.step_ms = Histogram(_STEP_MS)
        self.step_rows = Histogram(_ROWS)
        self.queue_ms = Histogram(_STEP_MS)
        self.gauges: Mapping[str, float] = {}

    def fault(self, name: str) -> None:
        """Counts a refusal."""
        self.faults[name] = self.faults.get(name, 0) + 1

    def text(self) -> str:
        """All of it for Prometheus."""
        lines: list[str] = []
        counters = {
            "messages": (self.messages, "Messages received"),
            "bytes_in": (self.bytes_in, "Payload bytes received"),
            "bytes_out": (self.bytes_out, "Payload bytes sent"),
            "malformed": (self.malformed, "Messages that broke the protocol"),
            "rows": (self.rows, "Rows computed"),
            "tokens": (self.tokens, "Tokens sampled"),
            "sessions_opened": (self.sessions_opened, "Sessions opened"),
            "sessions_evicted": (self.sessions_evicted, "Sessions whose KV was taken for others"),
            "sessions_expired": (self.sessions_expired, "Sessions forgotten after idling"),
            "prefix_asked_tokens": (self.prefix_asked, "Tokens that sessions wanted to begin with"),
            "prefix_found_tokens": (self.prefix_found, "Tokens of those whose KV was there"),
            "peers_dropped": (
                self.peers_dropped,
                "Connections dropped for silence or unread answers",
            ),
        }
        for name, (value, help_) in counters.items():
            lines += [f"# HELP isthmus_{name}_total {help_}.", f"# TYPE isthmus_{name}_total counter"]
            lines.append(f"isthmus_{name}_total {value}")
        lines += ["# HELP isthmus_faults_total Refused requests.", "# TYPE isthmus_faults_total counter"]
        lines += [
            f'isthmus_faults_total{{code="{code}"}} {count}' for code, count in sorted(self.faults.copy().items())
        ]
        for name, gauge in self.gauges.items():
            lines += [f"# TYPE isthmus_{name} gauge", f"isthmus_{name} {gauge:g}"]
        for name, histogram in (("step_ms", self.step_ms), ("step_rows", self.step_rows), ("queue_ms", self.queue_ms)):
            lines.append(f"# TYPE isthmus_{name} histogram")
            total = 0
            for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
                total += count
                label = "+Inf" if bound == float("inf") else f"{bound:g}"
                lines.append(f'isthmus_{name}_bucket{{le="{label}"}} {total}')
            lines += [f"isthmus_{name}_sum {histogram.sum:g}", f"isthmus_{name}_count {total}"]
        return "\n".join(lines) + "\n"
