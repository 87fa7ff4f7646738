"""Which of a cloud's models a device means."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import Offer
from isthmus.protocol.offers import listed


def choose(offers: Sequence[Offer], wanted: str, where: str = "the cloud") -> Offer:
    """The model that a device means.

    Args:
        wanted: the beginning of an id, or a name that one model alone has; empty for the only model.
        where: the cloud, for the error.

    Raises:
        DeviceError: no model fits, or several do.
    """
    found = [offer for offer in offers if is_meant(wanted, offer.model_id, offer.name)]
    if len(found) == 1:
        return found[0]
    if not found:
        problem = f"{where} serves no language model" + (f" {wanted!r}" if wanted else "")
    elif wanted:
        problem = f"{len(found)} models of {where} fit {wanted!r}"
    else:
        problem = f"{where} serves {len(found)} models"
    names = listed(found or offers)
    remedy = "choose one with model='...': the beginning of its id or a name of its own"
    raise DeviceError(f"{problem}: {names}" if names else problem, remedy)


def served(offers: Sequence[Offer], model_id: str, where: str) -> Offer:
    """The offer of a bundle's model.

    Raises:
        DeviceError: there is none.
    """
    for offer in offers:
        if offer.model_id == model_id:
            return offer
    names = ", ".join(f"{offer.name} ({offer.model_id[:12]})" for offer in offers) or "no language model"
    problem = f"{where} serves {names} and not this bundle's model {model_id[:12]}"
    raise DeviceError(problem, "use the bundle that the cloud serves, or another cloud")


def is_meant(wanted: str, model_id: str, name: str) -> bool:
    """Whether a model is the one that is wanted, or one of them."""
    return name == wanted or model_id.startswith(wanted.lower())
