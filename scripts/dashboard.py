"""Writes examples/grafana.json: a Grafana dashboard over what `isthmus serve --http` gives Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "examples" / "grafana.json"
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


def rate(name: str, by: str = "") -> str:
    """A counter's growth a second."""
    inside = f'rate(isthmus_{name}{{job=~"$job"}}[$__rate_interval])'
    return f"sum by ({by}) ({inside})" if by else f"sum({inside})"


def quantile(q: float, name: str, by: str = "") -> str:
    """What so large a share of a histogram's values do not exceed."""
    labels = f"le, {by}" if by else "le"
    inside = f'rate(isthmus_{name}_bucket{{job=~"$job"}}[$__rate_interval])'
    return f"histogram_quantile({q}, sum by ({labels}) ({inside}))"


def gauge(name: str, by: str = "") -> str:
    """What is true now."""
    inside = f'isthmus_{name}{{job=~"$job"}}'
    return f"sum by ({by}) ({inside})" if by else f"sum({inside})"


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Requests", "reqps", [(rate("requests_total", "mode"), "{{mode}}")]),
    ("Tokens", "short", [(rate("tokens_total"), "tokens a second"), (rate("rows_total"), "rows a second")]),
    ("Refused", "reqps", [(rate("faults_total", "code"), "{{code}}")]),
    (
        "Time to first token",
        "s",
        [
            (quantile(0.5, "time_to_first_token_seconds", "mode"), "{{mode}} median"),
            (quantile(0.99, "time_to_first_token_seconds", "mode"), "{{mode}} p99"),
        ],
    ),
    (
        "Time per output token",
        "s",
        [
            (quantile(0.5, "time_per_output_token_seconds", "mode"), "{{mode}} median"),
            (quantile(0.99, "time_per_output_token_seconds", "mode"), "{{mode}} p99"),
        ],
    ),
    (
        "Waiting for the engine",
        "s",
        [(quantile(0.5, "queue_seconds"), "median"), (quantile(0.99, "queue_seconds"), "p99")],
    ),
    (
        "Batch",
        "short",
        [(quantile(0.5, "step_sequences"), "sequences, median"), (quantile(0.5, "step_rows"), "rows, median")],
    ),
    ("A step of the engine", "s", [(quantile(0.5, "step_seconds"), "median"), (quantile(0.99, "step_seconds"), "p99")]),
    ("KV", "short", [(gauge("kv_blocks", "state"), "{{state}}")]),
    (
        "Found of prompts",
        "percentunit",
        [(f"{rate('prefix_found_tokens_total')} / {rate('prefix_asked_tokens_total')}", "share of tokens")],
    ),
    (
        "Sessions",
        "short",
        [
            (gauge("sessions"), "sessions"),
            (gauge("connections"), "connections"),
            (gauge("waiting_requests"), "requests under way"),
            (rate("sessions_evicted_total"), "evicted a second"),
        ],
    ),
    ("Traffic", "Bps", [(rate("bytes_total", "direction"), "{{direction}}")]),
]


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    """One picture."""
    place = {"x": number % _COLUMNS * _WIDTH, "y": number // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for at, (query, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole of it."""
    variables = [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {
            "name": "job",
            "type": "query",
            "label": "Job",
            "datasource": _SOURCE,
            "query": "label_values(isthmus_sessions, job)",
            "includeAll": True,
            "multi": True,
            "refresh": 2,
        },
    ]
    return {
        "title": "isthmus",
        "uid": "isthmus-cloud",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "panels": [panel(number, *one) for number, one in enumerate(PANELS)],
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")
