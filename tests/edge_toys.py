"""Devices with toy parts over simulated links, and what they say when they are alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.edge import Device, Timeouts
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain
from tests.edge_world import LossyWire, ToyBundle, toy_open_part

PROMPT = "hello world"
PATIENT = Timeouts(connect_ms=60_000, retry_ms=300, give_up_ms=60_000, progress_ms=600_000, confirm_ms=60_000)


@pytest.fixture(autouse=True, scope="module")
def toy_engine() -> Iterator[None]:
    """Parts are toys in a module that imports this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isthmus.engine.open_part", toy_open_part)
        yield


def device(
    wire: LossyWire | None = None, mode: str = "auto", bundle: ToyBundle | None = None, **options: Any
) -> Device:
    options.setdefault("timeouts", PATIENT)
    if wire is not None:
        options |= {"wire": wire, "clock": wire.clock}
    return Device(bundle or ToyBundle(), mode=mode, **options)  # type: ignore[arg-type]


def ids(tokens: Any) -> list[int]:
    return [token.id for token in tokens]


def local(prompt: Any = PROMPT, **options: Any) -> list[int]:
    with device(mode="local") as alone:
        return ids(alone.generate(prompt, **options))


def lie(one: Device) -> None:
    """The whole model on this device says something else than the cloud's at every fifth position."""
    part = one._holding.open(one.config.n_layers)
    sample = part.sample

    def other(log: Chain, sampling: Sampling) -> int:
        token = sample(log, sampling)
        return (token + 1) % 256 if len(log) % 5 == 0 else token

    part.sample = other  # type: ignore[method-assign]
