"""Which mode "auto" means: a pure function of what is known."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.edge.token import Mode
from isthmus.protocol.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Situation:
    """What the choice depends on.

    Attributes:
        has_cloud: whether a cloud was named.
        link_up: whether it answers.
        whole_model: whether this device can run every layer.
    """

    has_cloud: bool
    link_up: bool
    whole_model: bool


def choose(situation: Situation) -> Mode:
    """The cloud while it answers, this device otherwise.

    Raises:
        DeviceError: neither can answer.
    """
    if situation.has_cloud and situation.link_up:
        return "stream"
    if situation.whole_model:
        return "local"
    if situation.has_cloud:
        raise DeviceError(
            "the cloud does not answer and this device does not hold the whole model",
            "check the link, or give the device all layers of the bundle",
        )
    raise DeviceError("this device does not hold the whole model", "name a cloud, or use a bundle with all its layers")
