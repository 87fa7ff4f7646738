"""Experts of a converted model, rounded to nested codes that are fitted to the tokens that come to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="making experts needs torch==2.13.0")
pytest.importorskip("scipy")

from isthmus.engine.experts import Expert  # noqa: E402
from isthmus.protocol.errors import ModelError  # noqa: E402
from isthmus.quant.groups import dequantize  # noqa: E402
from isthmus.quant.nested import view  # noqa: E402
from isthmus.split import moefy_run  # noqa: E402
from isthmus.split.exit_states import Sample  # noqa: E402
from isthmus.split.moefy_decoder import Feed  # noqa: E402
from isthmus.split.moefy_fit import fitted, rounded  # noqa: E402
from isthmus.split.moefy_mixture import Mixture, batches  # noqa: E402
from isthmus.split.moefy_run import MoefyRun, identity  # noqa: E402
from isthmus.split.moefy_source import Shape  # noqa: E402
from tests.conformance.tiny import VOCAB, build  # noqa: E402

EXPERTS, ACTIVE = 4, 2
RNG = np.random.default_rng(5)
SAMPLES = [Sample(RNG.integers(0, VOCAB, int(n)).tolist()) for n in RNG.integers(20, 60, 60)]


@pytest.fixture(scope="module", params=[False, True], ids=["own", "pre-gate"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MoefyRun, Mixture]:
    """A tiny dense model, converted."""
    moefy_run.fast_dtype, kept = lambda: torch.float32, moefy_run.fast_dtype  # type: ignore[attr-defined]
    work = tmp_path_factory.mktemp("fit")
    source = build("llama", work).source
    shape = Shape(EXPERTS, ACTIVE, pre_gate=request.param)
    made = MoefyRun(source, identity(source), shape, work / "work", lambda _: lambda done, total: None)
    moefy_run.fast_dtype = kept  # type: ignore[attr-defined]
    return made, made.convert(SAMPLES)


def read_with(layers: Sequence[Sequence[Expert]], format: str, mixture: Mixture) -> Mixture:
    """The same mixture with weights as a width reads them."""
    feeds = []
    for experts in layers:
        gate, up, down = (
            [torch.from_numpy(dequantize(view(getattr(expert, name), format))) for expert in experts]
            for name in ("gate", "up", "down")
        )
        feeds.append(Feed(torch.cat(gate), torch.cat(up), torch.cat(down, dim=1)))
    return Mixture(mixture.decoder, feeds, mixture.routers, mixture.pre_gate)


def test_fitted_experts_say_more_nearly_what_the_model_says(run: tuple[MoefyRun, Mixture]) -> None:
    _, mixture = run
    held, taught = SAMPLES[:10], SAMPLES[10:]
    found = fitted(mixture, batches(taught, 1024), ACTIVE, "n8")
    plain = [rounded(feed, EXPERTS, "n8") for feed in mixture.feeds]
    assert [len(layer) for layer in found] == [EXPERTS] * len(mixture.feeds)
    with torch.no_grad():
        (batch,) = batches(held, 10_000)
        truth = mixture.last(batch, ACTIVE)
        for format, share in (("n2", 0.98), ("n4", 0.8)):
            off = [
                float((read_with(layers, format, mixture).last(batch, ACTIVE) - truth).square().mean())
                for layers in (found, plain)
            ]
            assert off[0] < share * off[1], format


def test_the_mixture_itself_stays(run: tuple[MoefyRun, Mixture]) -> None:
    _, mixture = run
    before = [feed.gate.clone() for feed in mixture.feeds]
    fitted(mixture, batches(SAMPLES, 1024), ACTIVE, "n4")
    assert all(torch.equal(old, feed.gate) for old, feed in zip(before, mixture.feeds, strict=True))


def test_formats_that_are_not_nested_are_rounded(run: tuple[MoefyRun, Mixture]) -> None:
    made, mixture = run
    found = made.experts(mixture, SAMPLES, "q8")
    assert {expert.gate.format for layer in found for expert in layer} == {"q8"}
    with pytest.raises(ModelError, match="'q3' is unknown"):
        made.experts(mixture, SAMPLES, "q3")
