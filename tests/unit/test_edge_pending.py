"""What is asked for and put off."""

from __future__ import annotations

from isthmus.edge.pending import Pending, Requests
from isthmus.protocol import messages as m


def test_a_request_that_was_put_off_and_is_answered_all_the_same_tells_nothing_of_the_trip() -> None:
    asked = Requests()
    pending = asked["manifest",] = Pending(m.GetManifest("id"), None, asked_at=1.0, retry_at=2.0)
    assert pending.timed(1.5)
    assert asked.put_off(None, 0, until=9.0) == 1.0
    assert pending.retry_at == 9.0 and not pending.timed(1.5)
    pending.repeated(9.5, retry_s=1.0)
    assert pending.retry_at == 11.5 and not pending.timed(9.6)  # of which of the two would it be?
