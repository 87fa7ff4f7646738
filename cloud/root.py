"""What the KV of sessions must have in common, beside the tokens, for one to take what another computed."""

from __future__ import annotations

from typing import NamedTuple


class Root(NamedTuple):
    """What blocks must have in common beside their tokens.

    Attributes:
        principal: whose they are.
        enter: layer before which rows entered, 0 for tokens.
        source: of the hidden states that entered, as the device names it; empty for tokens.
    """

    principal: str
    enter: int
    source: str


EVERYBODY = Root("", 0, "")  # of texts whose KV is for all owners; no owner has an empty name
