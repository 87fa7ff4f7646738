"""What /metrics says, read as Prometheus reads it, and the dashboard over it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.cloud.metrics import Gauge, Metrics
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from tests.cloud_world import PROMPT, World, rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }


def test_requests_are_counted_by_mode_and_timed() -> None:
    world = World()
    world.open()
    world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 6), turns=8)
    world.open(alias=2, session=b"2" * 16)
    world.ask(rows(PROMPT, 5, alias=2), turns=2)
    world.later(2.0)
    found = read(world.service.metrics)
    stream, verify = (("mode", "stream"),), (("mode", "verify"),)
    assert found["isthmus_requests_total", stream] == found["isthmus_requests_total", verify] == 1
    assert found["isthmus_request_bytes_total", stream] > len(PROMPT)
    assert found["isthmus_time_to_first_token_seconds_count", stream] == 1
    assert found["isthmus_time_per_output_token_seconds_count", stream] == 5
    assert found["isthmus_time_per_output_token_seconds_count", verify] == 1
    assert found["isthmus_queue_seconds_count", ()] == 2
    assert found["isthmus_step_sequences_sum", ()] >= 7
    assert found["isthmus_sessions", ()] == 2
    assert found["isthmus_kv_blocks", (("state", "held"),)] >= 2
    for way in ("in", "out"):
        assert found["isthmus_bytes_total", (("direction", way),)] > 0


def test_odd_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.gauges = {"odd": Gauge("Odd", {'a"b\\c\nd': 3.0}, "name")}
    assert read(metrics)["isthmus_odd", (("name", 'a"b\\c\nd'),)] == 3.0


def test_every_family_says_what_it_is() -> None:
    metrics = Metrics()
    metrics.mode("stream").first_s.add(0.2)
    for family in text_string_to_metric_families(metrics.text()):
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family.name


def test_buckets_are_cumulative() -> None:
    metrics = Metrics()
    for seconds in (0.0001, 0.004, 0.004, 99.0):
        metrics.queue_s.add(seconds)
    found = read(metrics)
    name = "isthmus_queue_seconds_bucket"
    counts = [found[name, (("le", bound),)] for bound in ("0.0005", "0.003", "0.005", "10", "+Inf")]
    assert counts == [1, 1, 3, 3, 4]
    assert found["isthmus_queue_seconds_sum", ()] == pytest.approx(99.0081)


def test_the_dashboard_asks_for_what_there_is() -> None:
    from tests.unit.test_house_readme import load

    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    assert dashboard == load("scripts/dashboard.py").dashboard()
    world = World()
    world.open()
    world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 2))
    world.ask(rows([*PROMPT, *[9] * 20], 1))
    world.later(2.0)
    known = {name for name, _ in read(world.service.metrics)}
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"isthmus_\w+", target["expr"])
    }
    assert asked and asked <= known, asked - known
