"""What a process that answers OpenAI's API is told, and what it says to the one that began it, in lines of JSON."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True):
    """The first line that it reads.

    Attributes:
        listen: HOST:PORT.
        cloud: the cloud's address.
        cloud_key: its public key; empty for a cloud in the clear.
        bundles: folders of the models.
        tokens: the list of bearer tokens, see `protocol.bearer`.
        open: whether whoever comes is let in while that list is empty.
        certificate, certificate_key: files for TLS; empty for none.
        most: answers under way at once.
        wait_s: that a question waits for its turn.
    """

    listen: str
    cloud: str
    cloud_key: str
    bundles: tuple[str, ...]
    tokens: str
    open: bool
    certificate: str = ""
    certificate_key: str = ""
    most: int = 64
    wait_s: float = 10.0


class News(msgspec.Struct, frozen=True):
    """A line that it writes.

    Attributes:
        port: where it listens now.
        problem, remedy: why it cannot.
        key, owner: let this public key in for that owner.
        back: whether what was let in for the owner is not any more.
    """

    port: int = 0
    problem: str = ""
    remedy: str = ""
    key: str = ""
    owner: str = ""
    back: bool = False


class Lent(msgspec.Struct, frozen=True):
    """A line that it reads: that key is let in."""

    key: str
