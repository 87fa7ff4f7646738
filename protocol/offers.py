"""What a cloud offers, for people."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.protocol.messages import Offer


def listed(offers: Sequence[Offer]) -> str:
    """Models for people: of each the name, the weights' format and the beginning of the id."""
    return ", ".join(f"{o.name} ({o.weights + ', ' if o.weights else ''}{o.model_id[:12]})" for o in offers)
