"""What clients ask, as OpenAI's API has it.

What changes no answer is ignored; what would change it, and is not done here, is refused.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from isthmus.apps.openai.errors import invalid, unsupported
from isthmus.engine.sampling import Sampling

MAX_CHOICES, MAX_STOPS, MAX_PROMPTS = 8, 4, 16
Whole = Annotated[int, Field(strict=True)]


class Part(BaseModel):
    """A piece of a message's content."""

    type: str
    text: str = ""


class Message(BaseModel):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates want it.

        Raises:
            ApiError: its content is other than text.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        if other := next((part.type for part in self.content if part.type != "text"), None):
            raise unsupported("messages", f"this model reads text and no {other}")
        return {"role": role, "content": "".join(part.text for part in self.content)}


class StreamOptions(BaseModel):
    """What a stream tells."""

    include_usage: bool = False


class Ask(BaseModel):
    """What both kinds of questions have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[Whole, Field(ge=0, lt=2**31)] | None = 0
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def usage_follows(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage

    def stops(self) -> tuple[str, ...]:
        """Words that end an answer.

        Raises:
            ApiError: one is empty.
        """
        words = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(words):
            raise invalid("a stop word is empty: leave it out or give it letters", "stop")
        return words

    def sampling(self) -> list[Sampling]:
        """How each of the choices is made: the same seed gives the same ones."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        temperature = 1.0 if self.temperature is None else self.temperature
        if not temperature:
            return [Sampling()] * self.choices
        settings = (temperature, self.top_k or 0, 1.0 if self.top_p is None else self.top_p, seed)
        return [Sampling(*settings, stream) for stream in range(self.choices)]

    def check(self) -> None:
        """Refuses what would change an answer and is not done here.

        Raises:
            ApiError: something is asked for that is not done.
        """
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise unsupported(name)


class ChatAsk(Ask):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of an answer; None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        """As `Ask.check`."""
        super().check()
        for name in ("logprobs", "tools", "functions"):
            if getattr(self, name):
                raise unsupported(name)
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise unsupported("response_format", "answers are text")
        if self.modalities is not None and self.modalities != ["text"]:
            raise unsupported("modalities", "answers are text")


class CompletionAsk(Ask):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = 16
    echo: bool | None = False
    best_of: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Whole | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each one to be gone on from.

        Raises:
            ApiError: there is none, or too many.
        """
        given = self.prompt
        found: list[str | list[int]]
        if isinstance(given, str):
            found = [given]
        elif given and isinstance(given[0], int):
            found = [[one for one in given if isinstance(one, int)]]
        else:
            found = [one for one in given if not isinstance(one, int)]
        if not 0 < len(found) <= MAX_PROMPTS or not all(found):
            raise invalid(f"give 1 to {MAX_PROMPTS} prompts, none of them empty", "prompt")
        return found

    def check(self) -> None:
        """As `Ask.check`."""
        super().check()
        for name in ("echo", "suffix"):
            if getattr(self, name):
                raise unsupported(name)
        if self.logprobs is not None:
            raise unsupported("logprobs")
        if self.best_of is not None and self.best_of != self.choices:
            raise unsupported("best_of")
