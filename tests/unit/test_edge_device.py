"""A device in all its modes over simulated links: the text never depends on the link or on who computed it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge import Device, Timeouts, Token
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError
from isthmus.protocol.keys import DeviceKeys, new_pair
from isthmus.protocol.transport import Refused
from tests.edge_world import CONFIG, EOS, MODEL_ID, LossyWire, ToyBundle, ToyCloud, ToyTokenizer, toy_open_part

PROMPT = "hello world"
PATIENT = Timeouts(connect_ms=60_000, retry_ms=300, give_up_ms=60_000, progress_ms=600_000)
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=7)]


@pytest.fixture(autouse=True, scope="module")
def toy_engine() -> Iterator[None]:
    """Parts are toys in this module."""
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


def ids(tokens: Sequence[Token] | Any) -> list[int]:
    return [token.id for token in tokens]


def local(prompt: Any = PROMPT, **options: Any) -> list[int]:
    with device(mode="local") as alone:
        return ids(alone.generate(prompt, **options))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("mode", "source"), [("local", "device"), ("stream", "cloud"), ("split", "split")])
def test_every_mode_gives_the_same_text(mode: str, source: str, sampling: Sampling) -> None:
    with device(LossyWire(ToyCloud()), mode) as one:
        tokens = list(one.generate(PROMPT, max_tokens=40, sampling=sampling))
        assert ids(tokens) == local(max_tokens=40, sampling=sampling)
        assert {token.source for token in tokens} == {source}
        assert [token.position for token in tokens] == list(range(11, 11 + len(tokens)))
        assert one.stats.tokens == ids(tokens)
        assert one.stats.text == "".join(token.text for token in tokens)
        assert (one.stats.bytes_up > 0) == (one.stats.round_trips > 0) == (mode != "local")


@pytest.mark.parametrize("cut", range(1, CONFIG.n_layers))
@pytest.mark.parametrize("codec", ["f32", "f16"])
def test_every_cut_gives_the_same_text(cut: int, codec: str) -> None:
    with device(LossyWire(ToyCloud()), "split", cut=cut, codec=codec) as one:
        assert ids(one.generate(PROMPT, max_tokens=20)) == local(max_tokens=20)


def test_int8_sends_less() -> None:
    sent = {}
    for codec in ("f32", "f16", "int8"):
        with device(LossyWire(ToyCloud()), "split", codec=codec) as one:
            assert len(ids(one.generate(PROMPT, max_tokens=20))) == 20
            sent[codec] = one.stats.bytes_up
    assert sent["f32"] > sent["f16"] > sent["int8"]


def test_long_prompts_go_in_pieces() -> None:
    prompt = [i * 7 % 256 for i in range(300)]
    wire = LossyWire(ToyCloud())
    with device(wire, "split") as one:
        assert ids(one.generate(prompt, max_tokens=5)) == local(prompt, max_tokens=5)
    rows = [x for x in wire.sent if isinstance(x, m.Rows)]
    assert max(len(x.tokens) for x in rows) <= 64  # what the toy cloud's Limits allow
    assert [x.want for x in rows[:5]] == [0, 0, 0, 0, m.WANT_SAMPLE]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["stream", "split"]),
    drop=st.floats(0, 0.25),
    repeat=st.floats(0, 0.4),
    delay_s=st.floats(0.001, 1.0),
    reconnect=st.sampled_from([5, 11, 1 << 60]),
    restart=st.sampled_from([3, 9, 17, 1 << 60]),
)
def test_a_bad_link_never_changes_the_text(
    seed: int, mode: str, drop: float, repeat: float, delay_s: float, reconnect: int, restart: int
) -> None:
    wire = LossyWire(ToyCloud(), seed, drop=drop, repeat=repeat, delay_s=(0.001, delay_s))
    wire.reconnect_every, wire.restart_after = reconnect, restart
    with device(wire, mode) as one:
        tokens = list(one.generate(PROMPT, max_tokens=16, sampling=SAMPLINGS[1]))
    assert ids(tokens) == local(max_tokens=16, sampling=SAMPLINGS[1])
    assert {token.source for token in tokens} == {"cloud" if mode == "stream" else "split"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["local", "stream", "split"]), st.integers(1, 5), st.integers(1, CONFIG.n_layers - 1)
        ),
        min_size=2,
        max_size=8,
    ),
    st.integers(0, 2**32),
)
def test_a_conversation_goes_on_in_any_mode(turns: list[tuple[str, int, int]], seed: int) -> None:
    wire = LossyWire(ToyCloud(), seed, drop=0.05, repeat=0.1, delay_s=(0.001, 0.3))
    with device(wire, "local") as one:
        prompt: str | None = PROMPT
        for mode, count, cut in turns:
            before = len(one.tokens)
            for token in one.generate(prompt, max_tokens=count, mode=mode, cut=cut):
                assert token.position >= before
            prompt = None
        log = one.tokens
    # Goes on after an end of text too: the log is what counts.
    with device(mode="local") as alone:
        expected = list(PROMPT.encode())
        for _ in range(len(log) - len(expected)):
            expected += ids(alone.generate(expected, max_tokens=1))
    assert log == expected


def test_only_what_the_other_side_lacks_is_computed_again() -> None:
    cloud = ToyCloud()
    with device(LossyWire(cloud), "stream") as one:
        first = ids(one.generate(PROMPT, max_tokens=8))
        assert cloud.computed == 11 + 7
        list(one.generate(max_tokens=4))
        assert cloud.computed == 11 + 7 + 1 + 3
        list(one.generate(max_tokens=4, mode="split"))
        assert cloud.computed == 22 + 23 + 3  # the lane of hidden states had nothing
        list(one.generate(max_tokens=1, mode="stream"))
        assert cloud.computed == 48 + 5
        assert one.stats.reused_tokens == 22
        list(one.generate(PROMPT.encode() + bytes(first[:3]), max_tokens=1))
        assert one.stats.reused_tokens == 13


def test_leaving_early_stops_the_cloud_and_keeps_what_was_read() -> None:
    wire = LossyWire(ToyCloud())
    with device(wire, "stream") as one:
        tokens = one.generate(PROMPT, max_tokens=40)
        head = [next(tokens).id for _ in range(3)]
        assert isinstance(one.stats.finish, str)
        rest = ids(one.generate(max_tokens=5))
        assert any(isinstance(x, m.Cancel) for x in wire.sent)
        assert head + rest == local(max_tokens=8)


def test_a_dead_cloud_is_replaced_by_the_whole_model() -> None:
    for mode in ("stream", "split", "auto"):
        wire = LossyWire(ToyCloud())
        wire.die_after = 8
        with device(wire, mode, timeouts=Timeouts()) as one:
            tokens = list(one.generate(PROMPT, max_tokens=20))
            assert ids(tokens) == local(max_tokens=20)
            assert {tokens[0].source, tokens[-1].source} == {"split" if mode == "split" else "cloud", "device"}
            assert "went on by itself" in one.stats.note


def test_auto_looks_only_shortly_for_a_cloud_that_went_away() -> None:
    cloud, wire = ToyCloud(), LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, timeouts=Timeouts()) as one:
        tokens = ids(one.generate(PROMPT, max_tokens=20))
        before = wire.now
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"device"}
        assert wire.now - before < 0.2
        wire.cloud, wire.die_after = cloud, 1 << 60
        wire.reconnect()
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"cloud"}
    assert tokens == local(max_tokens=28)


def test_a_dead_cloud_is_an_error_without_the_whole_model() -> None:
    wire = LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, "split", ToyBundle(held=3), timeouts=Timeouts()) as one:
        tokens = one.generate(PROMPT, max_tokens=20)
        with pytest.raises(LinkError, match="went away"):
            list(tokens)
    wire = LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, "stream", timeouts=Timeouts(), fallback=False) as one, pytest.raises(LinkError):
        list(one.generate(PROMPT, max_tokens=20))


def test_auto_goes_on_alone_when_nobody_answers_and_returns_to_the_cloud() -> None:
    cloud, wire = ToyCloud(), LossyWire(ToyCloud())
    wire.cloud = None
    with device(wire, timeouts=Timeouts()) as one:
        assert {token.source for token in one.generate(PROMPT, max_tokens=3)} == {"device"}
        assert "does not answer" in one.stats.note
        wire.cloud = cloud
        assert {token.source for token in one.generate(max_tokens=3)} == {"cloud"}
    wire.cloud = None
    with device(wire, "stream") as one, pytest.raises(LinkError, match="does not answer"):
        one.generate(PROMPT)


def test_a_key_that_is_refused_is_never_passed_over() -> None:
    class Closed(LossyWire):
        def receive(self, timeout_ms: float) -> Any:
            raise Refused("the cloud does not know this device's key", "have its owner run: isthmus keys allow")

    with device(Closed(ToyCloud())) as one, pytest.raises(LinkError, match="does not know this device's key"):
        one.generate(PROMPT)


class Unwilling(ToyCloud):
    """A cloud that refuses everything but greetings once it has a reason to."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: m.Fault | None = None

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        if self.reason is None or isinstance(message, m.Hello | m.Ping):
            return super().receive(message)
        alias, epoch = getattr(message, "alias", None), getattr(message, "epoch", 0)
        fault = m.Fault(self.reason.code, self.reason.problem, self.reason.remedy, self.reason.retry_ms)
        if self.reason.code is not m.Code.NOT_ALLOWED:
            fault.alias, fault.epoch = alias, epoch
        return [(0.0, fault)]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (m.Code.NOT_ALLOWED, "this key is not allowed any more"),
        (m.Code.KV_FULL, "the KV of 64 positions is full"),
        (m.Code.UNKNOWN_MODEL, "no such model here"),
    ],
)
def test_auto_goes_on_alone_when_the_cloud_does_not_want_it_any_more(code: m.Code, problem: str) -> None:
    cloud = Unwilling()
    with device(LossyWire(cloud), timeouts=Timeouts()) as one:
        tokens = ids(one.generate(PROMPT, max_tokens=4))
        cloud.reason = m.Fault(code, problem, "ask its owner")
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"device"}
        assert problem in one.stats.note and "by itself" in one.stats.note
        assert tokens == local(max_tokens=8)
        for mode in ("stream", "split"):
            with pytest.raises(IsthmusError, match=f"{problem}; ask its owner, or use mode local"):
                ids(one.generate(max_tokens=4, mode=mode))
        cloud.reason = None
        assert {token.source for token in one.generate(max_tokens=4)} == {"cloud"}
        assert one.stats.note == ""
    with device(LossyWire(cloud), bundle=ToyBundle(held=3), timeouts=Timeouts()) as one:
        cloud.reason = m.Fault(code, problem, "ask its owner")
        with pytest.raises(IsthmusError, match=f"{problem}; ask its owner$"):
            ids(one.generate(PROMPT, max_tokens=4))


def test_auto_does_not_wait_long_for_a_busy_cloud(caplog: pytest.LogCaptureFixture) -> None:
    cloud = Unwilling()
    wire = LossyWire(cloud)
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)
    with device(wire, timeouts=Timeouts()) as one:
        before = wire.now
        assert {token.source for token in one.generate(PROMPT, max_tokens=4)} == {"device"}
        assert 5.0 <= wire.now - before < 6.0
        assert "the cloud is busy: all seats are taken" in one.stats.note
    assert "the cloud is busy: waiting (all seats are taken)" in caplog.messages
    waiting = device(LossyWire(cloud), "stream", timeouts=Timeouts(), fallback=False)
    with waiting as one, pytest.raises(LinkError, match=r"gave no answer in 120 s.*or use mode local"):
        ids(one.generate(PROMPT, max_tokens=4))


def test_a_cloud_that_was_busy_for_a_while_leaves_no_note(caplog: pytest.LogCaptureFixture) -> None:
    cloud = Unwilling()
    wire = LossyWire(cloud)
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)

    def free(record: logging.LogRecord) -> None:
        cloud.reason = None

    with device(wire, "stream", timeouts=Timeouts()) as one:
        handler = logging.Handler()
        handler.emit = free  # type: ignore[method-assign]
        logging.getLogger("isthmus.edge").addHandler(handler)
        try:
            assert ids(one.generate(PROMPT, max_tokens=4)) == local(max_tokens=4)
        finally:
            logging.getLogger("isthmus.edge").removeHandler(handler)
        assert one.stats.note == ""
    assert len([line for line in caplog.messages if "busy: waiting" in line]) == 1


@pytest.mark.parametrize("mode", ["stream", "split", "auto"])
def test_a_cloud_with_another_model_is_refused(mode: str) -> None:
    with device(LossyWire(ToyCloud("cd" * 16)), mode) as one, pytest.raises(DeviceError, match="serves toy"):
        list(one.generate(PROMPT))


def test_a_codec_that_the_cloud_does_not_take() -> None:
    cloud = ToyCloud()
    cloud.codecs = ("f32", "f16")
    with device(LossyWire(cloud), "split", codec="int8") as one, pytest.raises(DeviceError, match="f32 or f16"):
        one.generate(PROMPT)


@pytest.mark.parametrize("mode", ["local", "stream", "split"])
def test_a_full_conversation_is_an_error(mode: str) -> None:
    with device(LossyWire(ToyCloud()), mode, kv_tokens=20) as one:
        with pytest.raises(DeviceError, match="room for 20"):
            one.generate("a prompt of more than twenty tokens")
        got: list[int] = []
        with pytest.raises(DeviceError, match="overflow='slide'"):
            got.extend(token.id for token in one.generate(PROMPT, max_tokens=50))
        assert got == local(max_tokens=10)
        assert len(list(one.generate(PROMPT, max_tokens=10))) == 10


def test_a_sliding_conversation_goes_on_alike_in_every_mode() -> None:
    texts = []
    for mode in ("local", "stream", "split"):
        with device(LossyWire(ToyCloud()), mode, kv_tokens=20, overflow="slide") as one:
            texts.append(ids(one.generate(PROMPT, max_tokens=60)))
            for other in ("split", "local", "stream"):
                texts[-1] += ids(one.generate(max_tokens=3, mode=other))
    assert len(texts[0]) > 60
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][:60] != local(max_tokens=60)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cut": 0}, "cut is 0 and the model has 6 layers; choose one in 1..5"),
        ({"cut": 6}, "choose one in 1..5"),
        ({"codec": "f8"}, "choose one of f32, f16, int8"),
        ({"mode": "magic"}, "choose one of auto, local"),
        ({"max_tokens": 0}, "ask for one or more"),
        ({"stop": ""}, "stop word is empty"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(options: dict[str, Any], problem: str) -> None:
    with device(LossyWire(ToyCloud())) as one, pytest.raises(IsthmusError, match=problem):
        one.generate(PROMPT, **options)


def test_bad_settings_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kv_tokens": 1000}, "1..512"),
        ({"overflow": "wrap"}, "error or slide"),
        ({"threads": -1}, "0 .one per core. or more"),
        ({"mode": "split", "cut": 9}, "1..5"),
    ]
    for options, problem in cases:
        with pytest.raises(DeviceError, match=problem):
            device(LossyWire(ToyCloud()), **options)
    with device(mode="local") as one:
        for prompt, problem in [("", "empty"), ([CONFIG.vocab_size], "vocabulary"), (None, "nothing to go on from")]:
            with pytest.raises(DeviceError, match=problem):
                one.generate(prompt)  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="needs a cloud"):
            one.generate(PROMPT, mode="stream")
    with pytest.raises(DeviceError, match="closed"):
        one.generate(PROMPT)
    with pytest.raises(DeviceError, match=r"bundle holds layers \[0, 3\) of 6"):
        device(mode="local", bundle=ToyBundle(held=3))
    with device(LossyWire(ToyCloud()), "split", ToyBundle(held=3), cut=3) as one:
        assert ids(one.generate(PROMPT, max_tokens=5)) == local(max_tokens=5)
        with pytest.raises(DeviceError, match=r"layers \[0, 4\)"):
            one.generate(PROMPT, cut=4)


def test_eos_and_stop_words_end_a_text() -> None:
    found = next(seed for seed in range(999) if EOS in local(max_tokens=60, sampling=Sampling(1.0, seed=seed)))
    for mode in ("local", "stream", "split"):
        with device(LossyWire(ToyCloud()), mode) as one:
            tokens = list(one.generate(PROMPT, max_tokens=60, sampling=Sampling(1.0, seed=found)))
            assert tokens[-1].id == EOS and tokens[-1].finish == one.stats.finish == "eos"
            whole = "".join(token.text for token in one.generate(PROMPT, max_tokens=20))
            last = list(one.generate(PROMPT, max_tokens=20, stop=[whole[4:6]]))[-1]
            assert (one.stats.text, last.finish) == (whole[: whole.find(whole[4:6])], "stop")


def test_chat_uses_kv_again_and_never_tokenizes_an_answer_anew() -> None:
    cloud = ToyCloud()
    with device(LossyWire(cloud), "stream") as one:
        first = ids(one.chat("hi", max_tokens=12))
        before = one.tokens
        list(one.chat("more?", max_tokens=4, mode="split"))
        added = "</s>\n<user>more?</s>\n<assistant>"
        if first[-1] == EOS:
            added = added.removeprefix("</s>")
        assert one.tokens[: len(before)] == before
        assert one.tokens[len(before) : -len(one.stats.tokens)] == ToyTokenizer().encode(added)
        list(one.chat("again", max_tokens=2))
        assert one.stats.reused_tokens >= len(before) - 1
        one.reset()
        assert ids(one.chat("hi", max_tokens=12)) == first


def test_chat_takes_whole_conversations() -> None:
    with device(mode="local") as one:
        asked = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
        list(one.chat(asked, max_tokens=5))
        asked += [{"role": "assistant", "content": one.stats.text}, {"role": "user", "content": "more"}]
        before = one.tokens
        list(one.chat(asked, max_tokens=5))
        assert one.tokens[: len(before)] == before
        with pytest.raises(DeviceError, match="role"):
            one.chat([{"text": "hi"}])


def test_the_model_is_asked_for_by_its_id() -> None:
    wire = LossyWire(ToyCloud())
    with device(wire, "stream") as one:
        list(one.generate(PROMPT, max_tokens=1))
    opened = next(x for x in wire.sent if isinstance(x, m.Open))
    assert (opened.model_id, opened.enter) == (MODEL_ID, 0)
    assert isinstance(wire.sent[-1], m.Close)


def test_two_threads_do_not_share_an_answer() -> None:
    with device(mode="local") as one, ThreadPoolExecutor(1) as other:
        answer = one.generate(PROMPT, max_tokens=5)
        next(answer)
        with pytest.raises(DeviceError, match="another thread"):
            other.submit(one.generate, PROMPT).result()
        rest = ids(answer)  # a finished answer binds nobody
        assert ids(other.submit(lambda: list(one.generate(PROMPT, max_tokens=5))).result())[1:] == rest


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), -5.0, 0.0])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(DeviceError, match=f"memory_mb is {number:g}; give a positive number"):
        device(mode="local", memory_mb=number)
    for name in ("connect_ms", "retry_ms", "give_up_ms", "progress_ms"):
        with pytest.raises(DeviceError, match=f"{name} is {number}"):
            Timeouts(**{name: number})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["auto", "stream", "split"])
def test_a_cloud_that_cannot_exist_is_an_error_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    keys = DeviceKeys(new_pair(), new_pair().public)
    with pytest.raises(LinkError, match=r"no host 'mistyped\.example'"):
        device(mode=mode, cloud="tcp://mistyped.example:5757", keys=keys)
    with pytest.raises(LinkError, match="has no port"):
        device(mode=mode, cloud="tcp://127.0.0.1:99999", keys=keys)
    with device(mode="local", cloud="tcp://mistyped.example:5757", keys=keys) as alone:  # needs no cloud
        assert ids(alone.generate(PROMPT, max_tokens=3)) == local(max_tokens=3)
