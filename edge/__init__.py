"""On the device: runs a part of a model, and talks to the cloud about the rest."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.edge.aio import AsyncDevice
    from isthmus.edge.device import Device
    from isthmus.edge.events import Timeouts
    from isthmus.edge.experts.report import ExpertReport
    from isthmus.edge.experts.settings import ExpertSettings
    from isthmus.edge.graph import GraphDevice
    from isthmus.edge.graph_stats import GraphStats
    from isthmus.edge.provision import fetch_part
    from isthmus.edge.token import CutOff, Rollback, Stats, Token
    from isthmus.engine.sampling import Sampling

__all__ = [
    "AsyncDevice",
    "CutOff",
    "Device",
    "ExpertReport",
    "ExpertSettings",
    "GraphDevice",
    "GraphStats",
    "Rollback",
    "Sampling",
    "Stats",
    "Timeouts",
    "Token",
    "fetch_part",
]

_HOMES = {
    "AsyncDevice": "aio",
    "CutOff": "token",
    "Device": "device",
    "ExpertReport": "experts.report",
    "ExpertSettings": "experts.settings",
    "GraphDevice": "graph",
    "GraphStats": "graph_stats",
    "Rollback": "token",
    "Sampling": "isthmus.engine.sampling",
    "Stats": "token",
    "Timeouts": "events",
    "Token": "token",
    "fetch_part": "provision",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(import_module(home if home.startswith("isthmus.") else f"isthmus.edge.{home}"), name)
