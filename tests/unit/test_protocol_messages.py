"""Messages: any language can read them, and nothing that breaks their bounds gets in."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol import messages as m
from isthmus.protocol.arrays import Shape
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.fields import MAX_ROWS

HASH = bytes(range(16))
SESSION = bytes(16)
SAMPLER = m.Sampler(0.7, 40, 0.9, 2**64 - 1, 3)
OFFER = m.Offer("ab" * 16, "model", 30, 576, 49152, "native-1", True, ("f16",), ("f32", "f16"), 2048)
MESSAGES: list[m.Message] = [
    m.Hello(1, 1, ("a",), "test"),
    m.Welcome(1, 1, (), (OFFER,), m.Limits(1000, 2000, 500, 64), (m.GraphOffer("cd" * 16, "network", True, 900),)),
    m.Open(SESSION, 1, 2, "ab", 15, "f16", 100, "n", 50),
    m.Opened(1, 2, 3, HASH, "n", "f16", 600),
    m.Rows(1, 2, 3, HASH, [4, 5], m.Tensor("f16", (2, 4), 0, bytes(16)), 5, SAMPLER, 100, True),
    m.Result(1, 2, 3, [7], 4, HASH, 10, 20, None),
    m.Generate(1, 2, 3, HASH, [4], 100, SAMPLER, (2, 3), 1000),
    m.Tokens(1, 2, 3, [4], True, "stop", 5, HASH, 6),
    m.Cancel(1, 2),
    m.Close(1, 2),
    m.Truncate(1, 3, 4),
    m.Ping(12345, b"more", 16),
    m.Pong(12345, bytes(16)),
    m.Credit(1000),
    m.Fault(m.Code.GAP, "problem", "remedy", 5, 1, 2, 3, 4, HASH),
    m.GetManifest("ab"),
    m.Manifest("ab", b"{}"),
    m.GetRange("ab", "weights/x", "0" * 64, 5, 65536),
    m.Range("ab", "weights/x", 5, 10, b"data"),
    m.Bye(100, "going"),
    m.Draft(1, 2, 3, HASH[:4], [4, 5, 300]),
    m.Draft(1, 2, 3, HASH[:4], [4], m.Tensor("f16", (1, 4), 0, bytes(8)), SAMPLER),
    m.Fill(1, 2, 3, HASH[:4], [4, 5], m.Tensor("f16", (2, 4), 0, bytes(16))),
    m.Verdict(1, 2, 3, 2, 9, HASH, 10, 20),
    m.Infer(7, "ab" * 16, (Shape("float32", (1, 2)), Shape("bool", ())), bytes(9), 100),
    m.Inferred(7, (Shape("int64", (1,)),), bytes(8), 10, 20, 3),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in MESSAGES} == set(m.Message.__args__)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_and_plain_msgpack_reads_it(message: m.Message) -> None:
    frames = m.encode(message)
    assert len(frames) == 1
    assert m.decode(frames) == message
    fields = msgpack.unpackb(frames[0])
    assert isinstance(fields, list)
    assert fields[0] == type(message).__struct_config__.tag
    assert m.decode([msgpack.packb(fields)]) == message


def test_another_language_may_leave_trailing_defaults_out() -> None:
    assert m.decode([msgpack.packb([5, 1, 2, 3, HASH, [9]])]) == m.Rows(1, 2, 3, HASH, [9])


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert m.decode([msgpack.packb([14, 5, "news", {"more": 1}])]) == m.Credit(5)


def test_a_code_of_a_newer_version_is_unknown() -> None:
    fault = m.decode([msgpack.packb([15, 250, "problem"])])
    assert isinstance(fault, m.Fault)
    assert fault.code is m.Code.UNKNOWN


@pytest.mark.parametrize("kind", [m.Rows, m.Result])
def test_a_large_tensor_travels_in_its_own_frame(kind: Any) -> None:
    tensor = m.Tensor("f32", (10, 576), 0, bytes(23040))
    message: Any = (
        m.Rows(1, 1, 0, HASH, [1] * 10, tensor)
        if kind is m.Rows
        else m.Result(1, 1, 0, [], 10, HASH, 0, 0, m.Tensor("f32", (10, 576), 0, bytes(23040)))
    )
    frames = m.encode(message)
    assert [len(frame) for frame in frames[1:]] == [23040]
    assert len(frames[0]) < 100
    assert len(message.hidden.data) == 23040
    assert m.decode(frames) == message


@pytest.mark.parametrize(
    "fields",
    [
        [5, -1, 2, 3, HASH, [9]],
        [5, 1, 2**32, 3, HASH, [9]],
        [5, 1, 2, 3, HASH + b"x", [9]],
        [5, 1, 2, 3, HASH, [2**32]],
        [5, 1, 2, 3, HASH, [0] * (MAX_ROWS + 1)],
        [5, 1, 2, 3, HASH, [9], None, 4, [float("nan"), 0, 1.0, 0, 0]],
        [5, 1, 2, 3, HASH, [9], None, 4, [float("inf"), 0, 1.0, 0, 0]],
        [5, 1, 2, 3, HASH, [9], None, 4, [0.0, 0, float("nan"), 0, 0]],
        [5, 1, 2, 3, HASH, [9], None, 4, [0.0, 0, 0.0, 0, 0]],
        [5, 1, 2, 3, HASH, [9], None, 4, [0.0, 2**31, 1.0, 0, 0]],
        [5, 1, 2, 3, HASH, [9], ["f16", [1, 1, 1, 1, 1], 0, b""]],
        [5, 1, 2, 3, HASH, [9], ["f16", [], 0, b""]],
        [5, 1, 2, 3],
        [3, b"short", 1, 2, "ab"],
        [18, "ab", "x", "0" * 64, 0, 65537],
        [18, "ab", "x", "0" * 64, 0, 0],
        [18, "ab", "x", "0" * 64, -1, 10],
        [12, 1.5],
        [99, 1],
        [],
        {"version": 1},
        "Hello",
        None,
    ],
    ids=str,
)
def test_what_breaks_the_bounds_is_refused(fields: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        m.decode([msgpack.packb(fields)])


def test_frames_that_do_not_belong_are_refused() -> None:
    ping = m.encode(m.Ping(1))
    with pytest.raises(ProtocolError, match="one frame"):
        m.decode([*ping, b"extra"])
    with pytest.raises(ProtocolError, match="0 frames"):
        m.decode([])
    with pytest.raises(ProtocolError, match="3 frames"):
        m.decode(ping * 3)
    with pytest.raises(ProtocolError, match="second frame"):
        m.decode([*m.encode(m.Rows(1, 1, 0, HASH, [1])), b"extra"])
    with pytest.raises(ProtocolError, match="second frame"):
        m.decode([*m.encode(m.Rows(1, 1, 0, HASH, [1], m.Tensor("f16", (1, 1), 0, b"ab"))), b"extra"])


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_are_refused_or_decoded(frames: list[bytes]) -> None:
    try:
        message = m.decode(frames)
    except ProtocolError:
        return
    assert m.decode(m.encode(message)) == message


@given(st.sampled_from(MESSAGES), st.integers(0, 500), st.integers(0, 255), st.booleans())
def test_mutated_messages_are_refused_or_decoded(message: m.Message, at: int, byte: int, cut: bool) -> None:
    frame = bytearray(m.encode(message)[0])
    at %= len(frame)
    frame[at] = byte
    try:
        decoded = m.decode([bytes(frame[:at] if cut else frame)])
    except ProtocolError:
        return
    assert m.decode(m.encode(decoded)) == decoded


@pytest.mark.parametrize(
    ("theirs", "theirs_min", "ours", "ours_min", "common"),
    [(1, 1, 1, 1, 1), (3, 2, 2, 1, 2), (2, 1, 3, 2, 2), (1, 1, 3, 2, None), (4, 3, 2, 1, None), (9, 1, 3, 2, 3)],
)
def test_version_n_speaks_with_its_neighbours(
    theirs: int, theirs_min: int, ours: int, ours_min: int, common: int | None
) -> None:
    assert m.agree(theirs, theirs_min, ours=ours, ours_min=ours_min) == common


def test_a_large_tensor_keeps_all_that_says_how_to_read_it() -> None:
    tensor = m.Tensor("ecsq6", (100, 576), 1, bytes(m.INLINE_BYTES + 1), b"12345678")
    fill = m.Fill(1, 2, 3, b"head", [4] * 100, tensor)
    assert m.decode(m.encode(fill)) == fill


def test_a_draft_ends_with_its_last_field_that_says_something() -> None:
    short = m.Draft(1, 2, 300, HASH[:4], [4, 5])
    (frame,) = m.encode(short)
    assert msgpack.unpackb(frame) == [21, 1, 2, 300, HASH[:4], [4, 5]] and len(frame) == 16
    for more in ({"firm": 2}, {"sampler": m.GREEDY}, {"sampler": SAMPLER, "firm": 1}):
        whole = msgspec.structs.replace(short, **more)
        (frame,) = m.encode(whole)
        assert m.decode([frame]) == whole
    assert m.decode(m.encode(short)) == short
