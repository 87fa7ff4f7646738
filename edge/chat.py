"""A conversation as messages over the token log: what to append for the next turn, so that KV is used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from isthmus.edge.text import utf8
from isthmus.protocol.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said; role is "system", "user" or "assistant"."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content}


def parse(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages from mappings.

    Raises:
        DeviceError: one is none, or lacks its role or content.
    """
    found = []
    for message in messages if isinstance(messages, Sequence) else (messages,):
        if not isinstance(message, Mapping):
            raise DeviceError(f"{message!r} is no message", "each is a mapping with a role and a content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise DeviceError(f"a message has no {name}: {message!r}", "each has a role and a content, both texts")
        found.append(Message(message["role"], utf8(message["content"])))
    return found


class Template(Protocol):
    """The tokenizer's side of a conversation."""

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str: ...

    def render(self, messages: Sequence[dict[str, str]], *, answer: bool = True) -> str: ...


class Chat:
    """The messages so far, of which the last is the model's answer.

    The token log is the truth: text that the model wrote is never tokenized anew when the next turn only adds to it.

    Args:
        eos: ids that end an answer.
    """

    def __init__(self, template: Template, eos: Sequence[int]) -> None:
        self.messages: list[Message] = []
        self._template, self._eos = template, frozenset(eos)
        self._log: list[int] = []  # the token log at the end of the last answer

    def prompt(self, asked: list[Message], log: Sequence[int]) -> list[int]:
        """The token log from which the answer to `asked` is generated.

        Args:
            log: the token log as it stands.
        """
        whole = self._render(asked, True)
        said = self.messages
        if said and asked[: len(said)] == said and len(asked) > len(said) and list(log) == self._log:
            added = self._added(asked, whole)
            if added is not None:
                return [*log, *self._template.encode(added, bos=False)]
        return self._template.encode(whole, bos=False)

    def answered(self, asked: list[Message], text: str, log: Sequence[int]) -> None:
        """Takes in the model's answer to `asked`."""
        self.messages = [*asked, Message("assistant", text)]
        self._log = list(log)

    def restore(self, messages: Sequence[Mapping[str, Any]], log: Sequence[int]) -> None:
        """Takes up a conversation that was kept; `log` is the token log at the end of its last answer."""
        self.messages, self._log = parse(messages), list(log)

    def forget(self) -> None:
        """Begins again."""
        self.messages, self._log = [], []

    def _added(self, asked: list[Message], whole: str) -> str | None:
        """What the template puts after the log's last answer; None when it changes what came before."""
        answer = self.messages[-1].content
        before = self._render(self.messages[:-1], True)
        closed = self._render(self.messages, False)
        if not closed.startswith(before + answer) or not whole.startswith(closed):
            return None
        added = whole[len(before) + len(answer) :]
        if self._log and self._log[-1] in self._eos:
            end = self._template.decode(self._log[-1:], special=True)
            if not added.startswith(end):
                return None
            added = added[len(end) :]
        return added

    def _render(self, messages: Sequence[Message], answer_follows: bool) -> str:
        return self._template.render([message.to_dict() for message in messages], answer=answer_follows)
