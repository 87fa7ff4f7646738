"""Devices in auto whose steps and whose cloud take time on a link's clock."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from isthmus.cloud.models import serve_part
from isthmus.cloud.service import Service
from isthmus.engine.part import Rows, StepResult
from isthmus.protocol import messages as m
from tests.edge_exits import CUT, give_exit
from tests.edge_toys import device, local
from tests.edge_world import LossyWire, ToyBundle, ToyService
from tests.toy_part import MODEL_ID, N_LAYERS, ToyPart

FAST = ((1, 2_000), (4, 4_000))  # steps of a cloud, in microseconds
SLOW = ((1, 80_000), (4, 160_000))


class TimedCloud(ToyService):
    """A service that says how fast it is."""

    def __init__(self, steps: tuple[tuple[int, int], ...] = FAST) -> None:
        self.steps = steps
        super().__init__()

    def forget(self) -> None:
        """See `ToyService`."""
        super().forget()
        model = serve_part(self.part, MODEL_ID, "toy", steps=self.steps, row_us=self.steps[0][1] // 4)
        self._service = Service([model], self._wire, None, clock=lambda: 0.0)

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        """See `ToyService`; the engine took what it says."""
        answers = []
        for delay, answer in super().receive(message):
            if isinstance(answer, m.Tokens | m.Verdict | m.Result) and answer.engine_us:
                answer = msgspec.structs.replace(answer, engine_us=self.steps[0][1])
            answers.append((delay, answer))
        return answers


class TimedPart(ToyPart):
    """A toy whose rows take their time on a link's clock."""

    def __init__(self, end: int, wire: LossyWire, row_ms: float) -> None:
        super().__init__(end)
        self._wire, self._row_ms = wire, row_ms

    def step(self, rows: Rows) -> StepResult:
        self._wire.now += len(rows) * self._row_ms * 1e-3
        return super().step(rows)


def decider(
    patch: pytest.MonkeyPatch,
    wire: LossyWire,
    row_ms: float = 10.0,
    known: bool = False,
    held: int = 6,
    part: Callable[[int], ToyPart] | None = None,
    **options: Any,
) -> Any:
    made = part or (lambda end: TimedPart(end, wire, row_ms))
    patch.setattr("isthmus.engine.open_part", lambda source, start, end, **_: made(end))
    bundle: Any = ToyBundle(held)
    agreement = SimpleNamespace(documents=0.6, answers=0.6)
    bundle.exits = (SimpleNamespace(layer=CUT, file="norm", agreement=agreement, certificate=None, codec=None),)
    bundle.holds = lambda name: held == N_LAYERS or name == "norm"
    one: Any = device(wire, bundle=bundle, **options)
    give_exit(one)
    if known:
        knowledge = one._steering._controller._knowledge
        knowledge._watch.remember(row_ms / knowledge._watch.sizes.of(N_LAYERS, True) * 1e6, row_ms / 5)
        knowledge._numerics = lambda: "toy"
    return one


def undisturbed(max_tokens: int) -> list[int]:
    """What a whole toy answers by itself, whichever part a test put in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isthmus.engine.open_part", lambda source, start, end, **_: ToyPart(end))
        return local(max_tokens=max_tokens)
