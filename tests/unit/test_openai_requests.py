"""What clients may ask, and what they are told in one piece."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.apps.openai.answers import Answers, Choice
from isthmus.apps.openai.errors import ApiError, of
from isthmus.apps.openai.requests import ChatAsk, CompletionAsk
from isthmus.edge.token import Stats, Token
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import ConversationFullError, DeviceError, LinkError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatAsk:
    return ChatAsk.model_validate({"model": "tiny", "messages": HELLO} | fields)


def completion(prompt: Any, **fields: Any) -> CompletionAsk:
    return CompletionAsk.model_validate({"model": "tiny", "prompt": prompt} | fields)


def test_defaults_are_those_of_openai() -> None:
    ask = chat()
    assert ask.choices == 1 and ask.most is None and not ask.stream and ask.stops() == ()
    (sampling,) = ask.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert completion("x").max_tokens == 16


def test_a_seed_fixes_all_choices_and_no_two_are_alike() -> None:
    first, again = chat(n=3, seed=-1).sampling(), chat(n=3, seed=-1).sampling()
    assert first == again and len({one.stream for one in first}) == 3
    assert first[0].seed == 2**64 - 1
    assert chat(temperature=0, n=2).sampling() == [Sampling(), Sampling()]
    assert chat().sampling() != chat().sampling()


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ask = chat(messages=[{"role": "developer", "content": parts}])
    assert ask.messages[0].plain() == {"role": "system", "content": "hello"}


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_would_change_an_answer_and_is_not_done_is_refused(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ApiError) as found:
        chat(**fields).check()
    assert found.value.status == 400 and found.value.parameter == parameter


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"logprobs": 0}, {"best_of": 2}])
def test_so_it_is_of_completions(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(fields))):
        completion("x", **fields).check()
    completion("x", best_of=1, echo=False).check()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"n": 0},
        {"n": 9},
        {"n": True},
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"max_tokens": 2**31},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"seed": 2**63},
        {"stop": ["a"] * 5},
        {"model": None},
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


def test_prompts_are_texts_or_tokens() -> None:
    assert completion("a").prompts() == ["a"]
    assert completion(["a", "b"]).prompts() == ["a", "b"]
    assert completion([1, 2]).prompts() == [[1, 2]]
    assert completion([[1], [2, 3]]).prompts() == [[1], [2, 3]]
    nothing: list[Any] = ["", [], [""], [[]], ["a"] * 17]
    for empty in nothing:
        with pytest.raises(ApiError, match="prompt"):
            completion(empty).prompts()
    with pytest.raises(ApiError, match="empty"):
        completion("a", stop="").stops()


def test_a_prompt_counts_once_for_all_its_choices() -> None:
    answers, choices = Answers(True, "tiny", "print"), [Choice(0), Choice(1, first=False)]
    for choice in choices:
        choice.add(Token(5, "hi", "cloud", 9))
        choice.end("eos", Stats(prompt_tokens=9, reused_tokens=4))
    told = answers.whole(choices)
    assert told["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert [one["message"]["content"] for one in told["choices"]] == ["hi", "hi"]
    assert {one["finish_reason"] for one in told["choices"]} == {"stop"}


def test_errors_are_the_requests_fault_or_the_clouds() -> None:
    assert of(ConversationFullError("full", "shorten it")).code == "context_length_exceeded"
    assert of(DeviceError("odd")).status == 400 and not of(DeviceError("odd")).code
    away = of(LinkError("silent", "try again"))
    assert away.status == 503 and away.headers["Retry-After"] and away.problem == "silent: try again"
