"""A language model timed on this machine: what is timed, on which bundles, and what comes back from the file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from isthmus.apps.cli.decoder_measure import PAUSES_MS, measure
from isthmus.apps.cli.decoder_profile import COLD_MS, DecoderProfile, load_decoder_profile
from isthmus.engine.config import ExpertsConfig
from isthmus.split.bundle import Bundle
from tests.decoder_plans import EXIT, a_profile, write_early
from tests.edge_bundle import CONFIG, write_tiny

LAYERS = CONFIG.n_layers


def measured(bundle: Bundle) -> DecoderProfile:
    return measure(bundle, 1, "here", "this", 0.05)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny"))


def test_tokens_after_pauses_are_timed_after_pauses(bundle: Bundle) -> None:
    slept = list[float]()
    measure(bundle, 1, "here", "this", 0.01, sleep=slept.append)
    assert set(slept) == {pause / 1e3 for pause in (*PAUSES_MS, COLD_MS)}


def test_a_model_is_measured_here_and_its_profile_comes_back_from_its_file(bundle: Bundle, tmp_path: Path) -> None:
    found = measured(bundle)
    assert found.model == bundle.manifest.model_id and found.n_layers == LAYERS
    assert [n for n, _ in found.rows_ms] == [1, 2, 4, 8] and found.prefill_row_ms > 0
    assert [pause for pause, _ in found.apart] == list(PAUSES_MS)
    assert 1.0 <= found.slower(PAUSES_MS[0]) <= found.slower(1e3)
    assert found.device(2).held == 2 and found.cloud(2.0).step(1) == pytest.approx(found.rows_ms[0][1] / 2)
    assert [k for k, _ in found.layers_cold_ms] == [k for k, _ in found.layers_ms]
    rests = [ms for _, ms in found.rests_ms]
    assert rests == sorted(rests, reverse=True)
    assert [k for k, _ in found.rests_cold_ms] == [k for k, _ in found.rests_ms]
    assert not found.exits_ms
    found.save(tmp_path / "tiny.json")
    assert load_decoder_profile(tmp_path / "tiny.json") == found


def test_exits_are_timed_where_they_are_held(tmp_path: Path) -> None:
    early = write_early(tmp_path / "tiny")
    found = measured(early)
    assert [k for k, _ in found.exits_ms] == [k for k, _ in found.exits_cold_ms] == [EXIT]
    device = found.device(LAYERS)
    assert device.drafted(EXIT) == pytest.approx(dict(found.layers_ms)[EXIT] + found.exits_ms[0][1])
    (tmp_path / "tiny" / early.exits[0].file).unlink()
    assert measured(Bundle.open(tmp_path / "tiny")).exits_ms == ()


def test_a_mixture_of_experts_is_timed_with_tokens_of_many_kinds(tmp_path: Path) -> None:
    write_tiny(tmp_path / "moe", experts=ExpertsConfig(8, 2, 96, True))
    assert measured(Bundle.open(tmp_path / "moe")).rests_ms


def test_parts_take_longer_after_pauses_as_the_whole_does() -> None:
    warm = a_profile("ab")  # ten ms a layer, five the head
    rests = tuple((k, 10.0 * (LAYERS - k) + 5.0) for k in range(1, LAYERS))
    apart = ((3, 1.5), (10, 2.0), (30, 2.0))
    old = msgspec.structs.replace(warm, apart=apart)
    assert old.device(2, 3.0).through(2) == pytest.approx(30.0)  # as the whole, where parts were not timed
    cold = tuple((k, ms + 4.0) for k, ms in warm.layers_ms)
    found = msgspec.structs.replace(
        old,
        exits_ms=((2, 6.0),),
        exits_cold_ms=((2, 8.0),),
        rests_ms=rests,
        layers_cold_ms=cold,
        rests_cold_ms=tuple((k, ms + 2.0) for k, ms in rests),
    )
    noisy = msgspec.structs.replace(found, apart=((3, 1.0), (10, 1.001), (30, 1.4)))
    assert noisy.device(LAYERS, 30.0).through(2) == pytest.approx(24.0)
    for pause_ms, share in ((0.0, 0.0), (3.0, 0.5), (10.0, 1.0), (100.0, 1.0)):
        device, cloud = found.device(LAYERS, pause_ms), found.cloud(2.0, pause_ms)
        assert device.drafted(2) == pytest.approx(26.0 + share * (4.0 + 2.0))
        assert cloud.rest(2) == pytest.approx((dict(rests)[2] + 2.0 * share) / 2)
        assert cloud.rest(2, 4.0) > cloud.rest(2)
        assert 0.0 < cloud.rest(LAYERS) <= cloud.rest(LAYERS - 1)
