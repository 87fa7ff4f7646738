"""Chat templates: Jinja in a sandbox, with the settings and helpers that templates on model hubs count on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2

from isthmus.protocol.errors import ModelError
from isthmus.split.sandbox import MeteredEnvironment, purse_for

MAX_TEMPLATE_CHARS = 65_536
_SHOWN_CHARS = 200  # of what a template says about itself


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = MeteredEnvironment()
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], answer: bool, names: Mapping[str, str]) -> str:
    """Messages through a chat template.

    Args:
        answer: whether the opening of the assistant's answer is appended.
        names: `bos_token` and `eos_token` for the template.

    Raises:
        ModelError: the template is damaged, unsafe, takes too much time or memory, or refuses the messages.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        problem = f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}"
        raise ModelError(problem, "send plain text (--raw)")
    said = list(messages)
    try:
        with purse_for(said):
            return _compile(template).render(
                messages=said, add_generation_prompt=answer, tools=None, documents=None, **names
            )
    except Exception as error:  # a template can make Python raise anything
        reason = " ".join(str(error)[:_SHOWN_CHARS].split()) or type(error).__name__
        raise ModelError(f"the chat template refuses the messages: {reason}", "send plain text (--raw)") from error
