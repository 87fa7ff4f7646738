"""What a device believes before it has seen much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from isthmus.edge import priors
from isthmus.edge.figures import CodecFigures


def bundle(*row_bytes: float | None) -> Any:
    codecs = (None if size is None else SimpleNamespace(row_bytes=size) for size in row_bytes)
    certificate = SimpleNamespace(emitted=0.4, risk=0.02, threshold=0.8, disagreement=0.05)
    agreement = SimpleNamespace(answers=0.5)
    exits = tuple(
        SimpleNamespace(layer=at, codec=codec, certificate=certificate, agreement=agreement)
        for at, codec in enumerate(codecs)
    )
    return SimpleNamespace(config=SimpleNamespace(d_model=576), exits=exits)


def test_coded_states_are_as_large_as_was_measured_for_each_exit() -> None:
    found = priors.exits(bundle(300.0, None, 340.0, 999.0), range(3))
    assert [(one.layer, one.row_bytes) for one in found] == [(0, 300.0), (1, 384.0), (2, 340.0)]
    assert priors.codecs(bundle(), ("f16", "f32")) == (CodecFigures("f32", 2304.0, 0.0),)
    assert priors.codecs(bundle(), ("f16",)) == ()
