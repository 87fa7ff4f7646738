"""What clients are told, as OpenAI's API has it: whole answers and chunks of them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.edge.token import Stats, Token

END = b"data: [DONE]\n\n"
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come.

    Attributes:
        index: among the answers to one request.
        first: whether it is the first one to its prompt, which counts once.
        sources: of its tokens.
        finish: why it ended, as OpenAI names it; empty while it goes on.
    """

    index: int
    first: bool = True
    text: str = ""
    sources: list[str] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, token: Token) -> None:
        """Takes in what comes next."""
        self.text += token.text
        self.sources.append(token.source)

    def end(self, finish: str, stats: Stats) -> None:
        """It is complete."""
        self.finish = _FINISH.get(finish, "length")
        self.prompt_tokens, self.cached_tokens = stats.prompt_tokens, stats.reused_tokens


class Answers:
    """The answers to one request.

    Args:
        chat: whether they are a chat's.
        model: its name.
        fingerprint: of what computes them.
    """

    def __init__(self, chat: bool, model: str, fingerprint: str) -> None:
        self.chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """All of them at once."""
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._complete(choice) for choice in choices],
            "usage": usage(choices),
        }

    def begun(self, choice: Choice) -> bytes:
        """The first chunk of a chat's answer; nothing otherwise."""
        return self._chunk(choice, {"role": "assistant", "content": ""}) if self.chat else b""

    def more(self, choice: Choice, token: Token) -> bytes:
        """The chunk of a token, with where it comes from."""
        origin = {"source": token.source, "position": token.position, "verified": token.verified}
        return self._chunk(choice, {"content": token.text} if self.chat else token.text, origin=origin)

    def ended(self, choice: Choice) -> bytes:
        """The last chunk of an answer."""
        return self._chunk(choice, {} if self.chat else "", finish=choice.finish)

    def cost(self, choices: Sequence[Choice]) -> bytes:
        """The chunk that says what all of them took."""
        return event({**self._head, "object": self._kind, "choices": [], "usage": usage(choices)})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _complete(self, choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"text": choice.text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        shown = {"index": choice.index, "logprobs": None, "finish_reason": choice.finish}
        return {**said, **shown, "isthmus": {"sources": choice.sources}}

    def _chunk(self, choice: Choice, said: Any, *, finish: str = "", origin: Mapping[str, Any] | None = None) -> bytes:
        one: dict[str, Any] = {"index": choice.index, "logprobs": None, "finish_reason": finish or None}
        one["delta" if self.chat else "text"] = said
        if origin is not None:
            one["isthmus"] = origin
        return event({**self._head, "object": self._kind, "choices": [one]})


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """What answers took."""
    asked = [choice for choice in choices if choice.first]
    prompt = sum(choice.prompt_tokens for choice in asked)
    said = sum(len(choice.sources) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in asked)},
    }


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
