"""A conversation in a file: taken up again at any byte, and refused when it is not what it should be."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.edge.journal import Journal
from isthmus.edge.options import GenerateOptions
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.errors import DeviceError, LinkError
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyCloud, ToyService
from tests.toy_part import MODEL_ID

WARM = Sampling(0.9, top_k=40, seed=7)


def leave(one: Any, tokens: Any, path: Path) -> None:
    """Kills a device: neither its file nor its cloud hears of it."""
    data = path.read_bytes()
    if one._link is not None:
        one._link._wire.cloud = None
    tokens.close()
    one.close()
    path.write_bytes(data)


def test_a_killed_device_goes_on_where_it_was(tmp_path: Path) -> None:
    text, service = local(max_tokens=40, sampling=WARM), ToyService()
    for cut_after in (1, 7, 20):
        path = tmp_path / f"{cut_after}.talk"
        wire = LossyWire(service)
        one = device(wire, "stream", resume=path)
        tokens = one.generate(PROMPT, max_tokens=40, sampling=WARM)
        head = [next(tokens).id for _ in range(cut_after)]
        leave(one, tokens, path)
        computed = service.part.rows
        again = LossyWire(service)
        with device(again, "stream", resume=path) as two:
            assert two.tokens[11:] == head == text[:cut_after]
            rest = list(two.go_on())
            assert head + ids(rest) == text == two.stats.tokens
            assert two.stats.finish == "length" and len(two.stats.sources) == 40
            assert two.unfinished is None
        sent = [x for x in again.sent if isinstance(x, m.Generate)]
        assert len(sent) == 1 and len(sent[0].tokens) <= 1 + cut_after  # the prompt's KV was still there
        assert service.part.rows - computed <= 41


def test_a_cloud_that_is_known_gets_the_time_to_start_again(tmp_path: Path) -> None:
    class Starting(LossyWire):
        @property
        def failure(self) -> LinkError | None:
            return None if self.greeted else LinkError("nothing answers", "wait")

    path, service = tmp_path / "talk", ToyService()
    one = device(LossyWire(service), "stream", resume=path)
    tokens = one.generate(PROMPT, max_tokens=20, sampling=WARM)
    next(tokens)
    leave(one, tokens, path)
    away = (100.0, 130.0)  # of 60 s in which a device may connect; 15 s where somebody says no
    with device(Starting(service), "stream", resume=path) as two:
        two._link._wire.dark = [away]  # type: ignore[union-attr]
        list(two.go_on())
        assert two.stats.tokens == local(max_tokens=20, sampling=WARM)
    with device(Starting(service), "stream", resume=tmp_path / "new") as two, pytest.raises(LinkError, match="nothing"):
        two._link._wire.dark = [away]  # type: ignore[union-attr]
        list(two.generate(PROMPT, max_tokens=20))


def test_a_device_that_was_ended_goes_on_too(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with device(LossyWire(ToyService()), "stream", resume=path) as one:
        for token in one.chat("hello", max_tokens=30):
            if token.position > 20:
                break
        said = one.tokens
    with device(LossyWire(ToyService()), "stream", resume=path) as two:
        assert two.tokens == said
        assert two.unfinished is not None
        list(two.go_on())
        whole = two.stats.tokens
        assert len(whole) == 30
        more = ids(two.chat("and then?", max_tokens=5))
        after = two.tokens
    with device(mode="local") as alone:
        assert ids(alone.chat("hello", max_tokens=30)) == whole
        assert ids(alone.chat("and then?", max_tokens=5)) == more
        assert alone.tokens == after
    with device(mode="local", resume=path) as three:
        assert three.unfinished is None and three.tokens == after
        assert [message.role for message in three._chat.messages] == ["user", "assistant"] * 2
        with pytest.raises(DeviceError, match="no answer to go on with"):
            three.go_on()


def test_a_chat_goes_on_without_the_answer_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    one = device(mode="local", resume=path)
    list(one.chat("hello", max_tokens=4))
    answer = one.chat("what?", max_tokens=9)
    next(answer)
    leave(one, answer, path)
    with device(mode="local", resume=path) as two:
        list(two.chat("again", max_tokens=4))
        said = two._tokenizer.decode(two.tokens)
        assert "<user>hello" in said and "<user>again" in said and "what?" not in said
        assert [message.content for message in two._chat.messages][::2] == ["hello", "again"]


@pytest.mark.parametrize("mode", ["local", "stream", "verify", "split"])
def test_every_mode_can_be_taken_up_by_every_mode(tmp_path: Path, mode: str) -> None:
    text, path, service = local(max_tokens=24), tmp_path / "talk", ToyService()
    one = device(LossyWire(service), mode, resume=path)
    tokens = one.generate(PROMPT, max_tokens=24)
    for _ in range(9):
        next(tokens)
    leave(one, tokens, path)
    with device(LossyWire(service), "stream", resume=path) as two:
        list(two.go_on())
        assert two.stats.tokens == text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), mode=st.sampled_from(["local", "stream", "verify"]))
def test_any_beginning_of_the_file_is_a_conversation(tmp_path: Path, share: float, mode: str) -> None:
    text, path = local(max_tokens=20), tmp_path / "whole"
    if not path.exists():
        with device(LossyWire(ToyService()), "stream", resume=path) as one:
            list(one.generate(PROMPT, max_tokens=20))
    data = path.read_bytes()
    torn = tmp_path / "torn"
    torn.write_bytes(data[: round(share * len(data))])
    with device(LossyWire(ToyService()), mode, resume=torn) as two:
        if two.unfinished is not None:
            list(two.go_on())
            assert two.stats.tokens == text
        elif len(two.tokens) != 31:
            assert ids(two.generate(PROMPT, max_tokens=20)) == text
        assert two.tokens[11:] == text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_a_damaged_file_is_refused_or_loses_its_last_line(tmp_path: Path, at: float, bit: int) -> None:
    path = tmp_path / "whole"
    if not path.exists():
        with device(mode="local", resume=path) as one:
            list(one.generate(PROMPT, max_tokens=20))
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(data))
    try:
        with device(mode="local", resume=bad) as two:
            tokens = two.tokens
    except DeviceError as error:
        assert "is damaged in line" in error.problem or "is no conversation" in error.problem
    else:
        assert local(max_tokens=20)[: len(tokens) - 11] == tokens[11:]


def test_what_is_no_conversation_of_this_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with device(mode="local", resume=path) as one:
        with pytest.raises(DeviceError, match="in use by another device"):
            Journal(path, MODEL_ID, "toy")
        list(one.generate(PROMPT, max_tokens=2))
    with pytest.raises(DeviceError, match="holds a conversation with"):
        device(mode="local", bundle=ToyBundle(model_id="cd" * 16), resume=path)
    for name, data in (
        ("word", b"hello\n"),
        ("text", b"hello\nworld\n"),
        ("line", b"no end of a line here"),
        ("zip", bytes(range(256))),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DeviceError, match="is no conversation of isthmus"):
            device(mode="local", resume=tmp_path / name)
        assert (tmp_path / name).read_bytes() == data
    with pytest.raises(DeviceError, match="cannot be written"):
        device(mode="local", resume=tmp_path)
    with pytest.raises(DeviceError, match="cannot be written"):
        device(mode="local", resume=tmp_path / "no" / "folder")
    assert path.stat().st_mode & 0o077 == 0


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    journal = Journal(path, MODEL_ID, "toy")
    journal.said([1, 2, 99999])
    journal.close()
    with pytest.raises(DeviceError, match="tokens that this model has not"):
        device(mode="local", resume=path)


def test_a_cloud_that_forgot_gets_it_all_again(tmp_path: Path) -> None:
    path, cloud = tmp_path / "talk", ToyCloud()
    one = device(LossyWire(cloud), "stream", resume=path)
    tokens = one.generate(PROMPT, max_tokens=20)
    next(tokens)
    leave(one, tokens, path)
    cloud.forget()
    with device(LossyWire(cloud), "stream", resume=path) as two:
        list(two.go_on())
        assert two.stats.tokens == local(max_tokens=20)


def test_what_was_forgotten_stays_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with device(mode="local", resume=path) as one:
        list(one.chat("my name is Bob", max_tokens=4))
        one.reset()
    with device(mode="local", resume=path) as two:
        assert two.tokens == [] and two._chat.messages == [] and two.unfinished is None
        answer = two.chat("three colors", max_tokens=9)
        next(answer)
        two.reset()
    with device(mode="local", resume=path) as three, device(mode="local") as fresh:
        assert three.unfinished is None
        assert ids(three.chat("hello", max_tokens=4)) == ids(fresh.chat("hello", max_tokens=4))


def test_a_prompt_is_never_taken_for_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    one = device(mode="local", resume=path)
    answer = one.generate(PROMPT, max_tokens=9)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    one._conversation.replace(list(b"another prompt"))  # and then it is killed
    leave(one, answer, path)
    with device(mode="local", resume=path) as two:
        assert two.unfinished is None and two.tokens == list(b"another prompt")


def test_an_answer_of_the_clouds_is_gone_on_with_alone(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    wire = LossyWire(ToyService())
    one = device(wire, "stream", resume=path)
    tokens = one.generate(PROMPT, max_tokens=20)
    next(tokens)
    leave(one, tokens, path)
    with device(mode="stream", resume=path) as two:
        with pytest.raises(DeviceError, match="stream mode needs a cloud"):
            two.go_on()
        assert two.unfinished is not None and two.unfinished.question == PROMPT
    with device(mode="local", resume=path) as three:
        list(three.go_on())
        assert three.stats.tokens == local(max_tokens=20)


def test_a_full_conversation_is_opened_and_can_be_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with device(mode="local", resume=path, kv_tokens=16) as one, pytest.raises(DeviceError, match="room for 16"):
        list(one.generate(PROMPT, max_tokens=20))
    with device(mode="local", resume=path, kv_tokens=16) as two:
        with pytest.raises(DeviceError, match="room for 16"):
            list(two.generate(max_tokens=2))
        two.reset()
        assert ids(two.generate(PROMPT, max_tokens=2)) == local(max_tokens=2)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_a_device_of_the_systems_is_no_file(name: str) -> None:
    with pytest.raises(DeviceError, match="is no file that can be kept"):
        device(mode="local", resume=name)


def lines(*records: Any) -> bytes:
    """A file of these records, as a device writes it: each line's checksum is of all up to it."""
    found, told = b"", 0
    for record in records:
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        told = zlib.crc32(text, told)
        found += b"%08x " % told + text + b"\n"
    return found


HEAD = ["isthmus", 2, MODEL_ID, "toy"]
WISHED = GenerateOptions(mode="stream").to_dict()
CRAFTED: dict[str, Any] = {
    "no JSON": b"hello",
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "a number": 5,
    "a text": "tokens",
    "nothing": [],
    "an unknown kind": ["word", 1],
    "a kind that is none": [["tokens"], [1], None],
    "tokens that are texts": ["tokens", ["1"], None],
    "tokens that are fractions": ["tokens", [1.5], None],
    "tokens below 0": ["tokens", [-1], None],
    "tokens that are none": ["tokens", 5, None],
    "a cut that is a fraction": ["cut", 0.0],
    "a cut beyond the end": ["cut", 1],
    "a base that is a fraction": ["asked", 0.0, WISHED, None],
    "options that are none": ["asked", 0, None, None],
    "options of another kind": ["asked", 0, WISHED | {"more": 1}, None],
    "a number of tokens that is a fraction": ["asked", 0, WISHED | {"max_tokens": 2.5}, None],
    "a stop word that is none": ["asked", 0, WISHED | {"stop": [1]}, None],
    "stop words that are one text": ["asked", 0, WISHED | {"stop": "word"}, None],
    "a cut that is a text": ["asked", 0, WISHED | {"cut": "3"}, None],
    "a codec that is a number": ["asked", 0, WISHED | {"codec": 0}, None],
    "a threshold that is true": ["asked", 0, WISHED | {"threshold": True}, None],
    "guesses that are fractions": ["asked", 0, WISHED | {"guesses": 1.5}, None],
    "a seed that is a text": ["asked", 0, WISHED | {"sampling": WISHED["sampling"] | {"seed": "7"}}, None],
    "messages that are a text": ["asked", 0, WISHED, "hello"],
    "a message without a content": ["asked", 0, WISHED, [{"role": "user"}]],
    "a content that is a number": ["ended", [{"role": "user", "content": 5}], "eos"],
    "messages that are none": ["ended", None, "eos"],
    "a session that is no text": ["lane", 1, 5, 0, 1, ""],
    "a session that is no hex": ["lane", 1, "hello", 0, 1, ""],
    "a session that is too short": ["lane", 1, "abcd", 0, 1, ""],
    "an epoch that is a text": ["lane", 1, "ab" * 16, 0, "1", ""],
    "an epoch that is a fraction": ["lane", 1, "ab" * 16, 0, 1.5, ""],
    "an epoch below 0": ["lane", 1, "ab" * 16, 0, -1, ""],
    "an epoch that no message can carry": ["lane", 1, "ab" * 16, 0, 2**32, ""],
    "an alias that is a list": ["lane", [1], "ab" * 16, 0, 1, ""],
    "a layer that is none": ["lane", 1, "ab" * 16, None, 1, ""],
    "a lane's codec that is a number": ["lane", 1, "ab" * 16, 0, 1, 5],
    "a lane without a codec": ["lane", 1, "ab" * 16, 0, 1],
}


@pytest.mark.parametrize("what", list(CRAFTED))
def test_a_record_that_is_none_is_said_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "talk"
    data = lines(HEAD, CRAFTED[what], ["cut", 0])
    path.write_bytes(data)
    with pytest.raises(DeviceError) as raised:
        device(mode="local", resume=path)
    assert raised.value.problem == f"{path} is damaged in line 2"
    assert path.read_bytes() == data


def test_a_lane_as_it_is_written_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    path.write_bytes(lines(HEAD, ["lane", 1, "ab" * 16, 0, 1, ""], ["cut", 0]))
    device(mode="local", resume=path).close()


@pytest.mark.parametrize(
    "head", [b"hello", 5, ["isthmus"], ["isthmus", 2, 5, "toy"], ["isthmus", 2, MODEL_ID, None], {"isthmus": 1}]
)
def test_a_head_that_is_none_is_no_conversation(tmp_path: Path, head: Any) -> None:
    path = tmp_path / "talk"
    path.write_bytes(lines(head, ["cut", 0]))
    with pytest.raises(DeviceError, match="is no conversation of isthmus"):
        device(mode="local", resume=path)


def test_options_that_an_older_version_wrote_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    older = {"max_tokens": 5, "sampling": {}, "stop": []}
    path.write_bytes(lines(HEAD, ["tokens", list(PROMPT.encode()), None], ["asked", 11, older, None]))
    with device(mode="local", resume=path) as one:
        assert ids(one.go_on()) == local(max_tokens=5)


@pytest.mark.parametrize("how", ["left out", "doubled", "swapped"])
def test_a_file_with_other_lines_than_were_written_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "talk"
    with device(mode="local", resume=path) as one:
        ids(one.generate(PROMPT, max_tokens=6))
    written = path.read_bytes().splitlines(keepends=True)
    assert len(written) > 6
    for at in range(1, len(written) - 2):
        one_, two = written[at : at + 2]
        changed = {"left out": [two], "doubled": [one_, one_, two], "swapped": [two, one_]}[how]
        path.write_bytes(b"".join([*written[:at], *changed, *written[at + 2 :]]))
        with pytest.raises(DeviceError, match="is damaged in line"):
            device(mode="local", resume=path)


def test_a_full_disk_is_said_and_everything_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = device(mode="local", resume=tmp_path / "talk")

    class Full:
        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    sound, one._journal._file = one._journal._file, Full()  # type: ignore[union-attr]
    with pytest.raises(DeviceError, match="No space left on device"):
        list(one.generate(PROMPT, max_tokens=4))
    one.close()
    assert one._closed
    sound.close()


def test_a_complete_answer_is_told_as_long_as_nothing_else_was_said(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with device(LossyWire(ToyService()), "stream", resume=path) as one:
        assert one.answered is None
        told = ids(one.chat(PROMPT, max_tokens=9))
        text = one.stats.text
    with device(LossyWire(ToyService()), "stream", resume=path) as two:
        assert two.answered is not None and two.unfinished is None
        assert (two.answered.tokens, two.answered.text, two.answered.finish) == (told, text, "length")
        assert two.messages == [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]
        next(two.chat("more", max_tokens=2))
        assert two.answered is None
