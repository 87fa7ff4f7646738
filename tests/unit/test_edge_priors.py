"""What a device believes before it has seen much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.edge import priors
from isthmus.edge.figures import CodecFigures


def bundle(*row_bytes: float | None) -> Any:
    codecs = (None if size is None else SimpleNamespace(row_bytes=size) for size in row_bytes)
    exits = tuple(SimpleNamespace(layer=at, codec=codec) for at, codec in enumerate(codecs))
    return SimpleNamespace(config=SimpleNamespace(d_model=576), exits=exits)


@pytest.mark.parametrize(("measured", "coded"), [((), 384.0), ((None,), 384.0), ((300.0, None, 340.0), 320.0)])
def test_coded_states_are_as_large_as_was_measured(measured: tuple[float | None, ...], coded: float) -> None:
    assert priors.codecs(bundle(*measured, 999.0), range(len(measured)), ("f16", "f32")) == (
        CodecFigures("f32", 2304.0, 0.0),
        CodecFigures("coded", coded, 0.0),
    )
    assert [one.name for one in priors.codecs(bundle(*measured), range(len(measured)), ("f16",))] == ["coded"]
