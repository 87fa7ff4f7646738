"""Chat templates: Jinja in a sandbox, with the settings and helpers that templates on model hubs count on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.protocol.errors import ModelError


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], answer: bool, names: Mapping[str, str]) -> str:
    """Messages through a chat template.

    Args:
        answer: whether the opening of the assistant's answer is appended.
        names: `bos_token` and `eos_token` for the template.

    Raises:
        ModelError: the template is damaged, unsafe, or refuses the messages.
    """
    try:
        return _compile(template).render(
            messages=list(messages), add_generation_prompt=answer, tools=None, documents=None, **names
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ModelError(f"the chat template refuses the messages: {error}", "send plain text (--raw)") from error
