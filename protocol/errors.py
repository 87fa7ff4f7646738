"""The errors of every package, rooted in one place; standard library only.

Each error says what was wrong (`problem`, with the value) and what to do about it (`remedy`). The command
line prints both on one line and exits with 2.
"""

from __future__ import annotations


class IsthmusError(Exception):
    """Root of all errors that a person can mend.

    Args:
        problem: what was wrong, with the offending value.
        remedy: what to do about it; empty when there is nothing to be done.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class ProtocolError(IsthmusError):
    """A message, tensor or key that breaks the protocol."""


class LinkError(ProtocolError):
    """The other side cannot be reached, refused the connection, or fell silent."""


class SlowLinkError(LinkError):
    """The link was too slow for what had to be through by a certain time; it may do better the next time."""


class QuantError(IsthmusError):
    """A weight format that does not fit its data."""


class EngineError(IsthmusError):
    """A part of a model that cannot be run as asked."""


class OutOfBlocks(EngineError):
    """The KV pool has no free block left for the rows of a step."""


class ModelError(IsthmusError):
    """A checkpoint, family or tokenizer that cannot be read."""


class BundleError(IsthmusError):
    """A bundle that is missing, truncated, altered or of another version."""


class DeviceError(IsthmusError):
    """The device cannot do what it was asked to do."""


class ConversationFullError(DeviceError):
    """There is no room for more tokens, here or in the cloud."""


class ServiceError(IsthmusError):
    """The cloud service cannot start or refused a request."""


class PlanError(IsthmusError):
    """A network, profile or budget for which there is no plan."""


def first_line(error: Exception) -> str:
    """What another library says went wrong, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
