"""Random and mutated messages beside an honest session."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.cloud.models import serve_part
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.transport import Incoming
from tests.cloud_world import PROMPT, SESSION, World, rows
from tests.fakes import FakePart, fake_text

FRAMES = [
    m.encode(message)[0]
    for message in (
        m.Hello(1, 1),
        m.Open(SESSION, 1, 1, "aa"),
        m.Open(b"z" * 16, 2, 3, "aa", 2),
        rows(PROMPT, 5),
        rows(PROMPT, 2),
        m.Generate(1, 1, 0, Chain().head, PROMPT, 3),
        m.Truncate(1, 2, 1),
        m.Cancel(1, 1),
        m.Close(1, 1),
        m.GetRange("aa", "x", "0" * 64, 0, 1),
        m.GetManifest(""),
        m.Ping(1),
        m.Credit(5),
    )
]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FRAMES), st.integers(0, 100), st.integers(0, 255), st.booleans(), st.binary(max_size=30)
        ),
        max_size=40,
    )
)
def test_an_honest_session_is_served_whatever_others_send(noise: list[tuple[bytes, int, int, bool, bytes]]) -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    world.open(b"honest", session=b"h" * 16)
    log, said = list(PROMPT), list(PROMPT)
    for frame, at, byte, mutate, extra in noise:
        changed = bytearray(frame)
        if mutate:
            changed[at % len(changed)] = byte
        world.wire.waiting.append(Incoming(b"bad", "", [bytes(changed), extra] if extra else [bytes(changed)]))
        world.wire.put(rows(log, len(said)), b"honest")
        world.service.turn(0.0)
        (result,) = [answer for answer in world.wire.take(b"honest") if isinstance(answer, m.Result)]
        said = result.tokens
        log += said
    assert log == PROMPT + fake_text(PROMPT, len(noise))
    for model in world.service.models.values():
        for session in model.sessions:
            assert session.sequence.length == session.committed <= len(session.chain)
    world.service.close()
    assert part.sequences == []
