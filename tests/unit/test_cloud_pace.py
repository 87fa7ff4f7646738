"""What a service says of its speed is what it measured, and nothing where there is no room to measure."""

from __future__ import annotations

from isthmus.cloud.models import serve_part
from isthmus.cloud.pace import ROOM, STEPS, measured
from tests.toy_part import MODEL_ID, ToyPart


class Small(ToyPart):
    """A part with KV for a few positions."""

    free_tokens = ROOM - 1


def test_steps_are_measured_and_offered() -> None:
    steps, row_us = measured(ToyPart())
    assert [count for count, _ in steps] == list(STEPS)
    assert all(us > 0 for _, us in steps)
    offer = serve_part(ToyPart(), MODEL_ID, "toy", steps=steps, row_us=row_us).offer
    assert (offer.steps, offer.row_us) == (steps, row_us)
    assert serve_part(ToyPart(), MODEL_ID, "toy").offer.steps == ()


def test_nothing_is_said_where_there_is_no_room_to_measure() -> None:
    assert measured(Small()) == ((), 0)
