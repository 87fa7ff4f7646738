"""A device in all its modes over simulated links: the text never depends on the link or on who computed it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge import Timeouts
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.errors import DeviceError, IsthmusError
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyCloud, ToyTokenizer
from tests.toy_part import CONFIG, EOS, MODEL_ID

SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=7)]


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
    fallback=st.booleans(),
)
def test_a_bad_link_never_changes_the_text(
    seed: int, mode: str, drop: float, repeat: float, delay_s: float, reconnect: int, restart: int, fallback: bool
) -> None:
    wire = LossyWire(ToyCloud(), seed, drop=drop, repeat=repeat, delay_s=(0.001, delay_s))
    wire.reconnect_every, wire.restart_after = reconnect, restart
    with device(wire, mode, fallback=fallback) as one:
        tokens = list(one.generate(PROMPT, max_tokens=16, sampling=SAMPLINGS[1]))
    assert ids(tokens) == local(max_tokens=16, sampling=SAMPLINGS[1])
    assert {token.source for token in tokens if token.verified} <= {"cloud" if mode == "stream" else "split"}
    assert {token.source for token in tokens if not token.verified} <= ({"device"} if fallback else set())
    assert one.stats.unverified == one.stats.replaced == 0


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
        ({"max_tokens": 0}, "max_tokens is 0; choose a whole number from 1 on"),
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
        ({"threads": -1}, "threads is -1; choose a whole number from 0 on"),
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
    for name in ("connect_ms", "retry_ms", "give_up_ms", "progress_ms", "confirm_ms"):
        with pytest.raises(DeviceError, match=f"{name} is {number}"):
            Timeouts(**{name: number})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": float("nan")},
        {"threshold": "sure"},
        {"guesses": -1},
        {"guesses": 1.5},
        {"guesses": 32},
        {"draft_depth": 2.5},
        {"threads": 1.5},
        {"kv_tokens": 64.5},
        {"memory_mb": "much"},
        {"max_disagreement": "none"},
    ],
)
def test_settings_that_are_none_are_refused_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(DeviceError, match=name.removeprefix("the ")):
        device(mode="local", **options)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda one: one.generate(PROMPT, max_tokens=2.5), "max_tokens is 2.5"),
        (lambda one: one.generate(["a"]), "no token"),
        (lambda one: one.generate("\ud800"), "not UTF-8"),
        (lambda one: one.generate(PROMPT, stop=None), "stop is None"),
        (lambda one: one.chat(None), "None is no message"),
        (lambda one: one.chat([5]), "5 is no message"),
        (lambda one: one.chat([{"role": "user"}]), "no content"),
        (lambda one: one.chat("\ud800"), "not UTF-8"),
    ],
)
def test_questions_that_are_none_are_refused_in_a_line(ask: Any, said: str) -> None:
    with device(mode="local") as one, pytest.raises(DeviceError, match=said):
        ask(one)


def test_an_answer_of_a_thread_that_has_ended_binds_nobody() -> None:
    with device(mode="local") as one:
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(one.generate, PROMPT).result()
            other.submit(next, answer).result()
        assert ids(one.generate(PROMPT, max_tokens=3)) == local(max_tokens=3)
    with pytest.raises(DeviceError, match="closed"):
        one.reset()
