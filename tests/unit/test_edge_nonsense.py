"""A cloud that answers nonsense: the device says so, and goes on alone where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from isthmus.protocol import messages as m
from isthmus.protocol.errors import LinkError
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyService


class Odd(ToyService):
    """Changes its answers of one kind, from the third on."""

    def __init__(self, kind: type, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self._kind, self._change, self._count = kind, change, 0

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        return [(delay, self._odd(answer)) for delay, answer in super().receive(message)]

    def _odd(self, answer: Any) -> Any:
        self._count += isinstance(answer, self._kind)
        return self._change(answer) if isinstance(answer, self._kind) and self._count > 2 else answer


CASES = {
    "a token that no vocabulary has": ("stream", m.Tokens, lambda x: put(x, tokens=[99_999])),
    "a token of a split model that no vocabulary has": ("split", m.Result, lambda x: put(x, tokens=[99_999])),
    "a token after drafts that no vocabulary has": ("verify", m.Verdict, lambda x: put(x, token=99_999)),
    "more drafts accepted than sent": ("verify", m.Verdict, lambda x: put(x, accepted=m.MAX_DRAFT)),
    "a verdict on what was never sent": ("verify", m.Verdict, lambda x: put(x, position=x.position + 500)),
    "a result of what was never sent": ("split", m.Result, lambda x: put(x, position=x.position + 500)),
}


def put(message: Any, **changed: Any) -> Any:
    return msgspec.structs.replace(message, **changed)


@pytest.mark.parametrize("case", list(CASES))
def test_the_device_says_so_and_goes_on_alone(case: str) -> None:
    mode, kind, change = CASES[case]
    with device(LossyWire(Odd(kind, change)), mode) as one:
        told = ids(one.generate(PROMPT, max_tokens=20))
        assert told == local(max_tokens=20)
        assert "answers nonsense" in one.stats.note and "went on by itself" in one.stats.note
        assert one.stats.sources[-1] == "device"


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_an_error_where_the_device_cannot_go_on(case: str) -> None:
    mode, kind, change = CASES[case]
    partial = ToyBundle(held=3)
    with device(LossyWire(Odd(kind, change)), mode, partial) as one, pytest.raises(LinkError, match="answers nonsense"):
        ids(one.generate(PROMPT, max_tokens=20))
