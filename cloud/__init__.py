"""The service: sessions of many devices in one batch, the rest of the model. Start it with `isthmus serve`."""

from __future__ import annotations

__all__: list[str] = []
