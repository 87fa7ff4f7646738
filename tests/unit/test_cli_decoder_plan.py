"""Plans for a language model: prices are those of `auto`, every cut is a way, and what was asked for is kept to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.apps.cli.decoder_plan import DecoderPlan, plan
from isthmus.apps.cli.decoder_profile import DecoderProfile, load_decoder_profile
from isthmus.apps.cli.decoder_ways import EXACT, Answer, Setting, link_figures
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.link import Link, read_link
from isthmus.split.traces import Trace, per_second
from tests.decoder_plans import a_profile, write_early
from tests.edge_bundle import CONFIG, write_tiny

LAYERS = CONFIG.n_layers
NEAR, FAR, SLOW = "rtt=0.1,rate=1000", "rtt=200,up=1,down=10", "rtt=20,rate=0.01"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_tiny(tmp_path_factory.mktemp("plan") / "tiny"))


@pytest.fixture
def profile(bundle: Bundle) -> DecoderProfile:
    """Ten ms a layer, five the head."""
    return a_profile(bundle.manifest.model_id)


def planned(bundle: Bundle, profile: DecoderProfile, link: str, times: float = 8.0, **asked: Any) -> DecoderPlan:
    return plan(Setting(bundle, profile, profile, times, read_link(link), Answer(**asked)))


def test_the_far_cloud_answers_alone_and_a_slow_one_is_not_asked(bundle: Bundle, profile: DecoderProfile) -> None:
    far = planned(bundle, profile, FAR)
    assert far.ways[far.best].mode == "stream" and far.verdict.startswith("Do not split it, but let the cloud answer")
    alone = planned(bundle, profile, SLOW, times=0.5)
    assert alone.ways[alone.best].mode == "local" and alone.verdict.startswith("Do not share it")
    local = alone.ways[alone.best]
    assert local.token_ms == pytest.approx(10.0 * LAYERS + 5.0) and local.up_bytes == 0.0
    assert local.total_ms == pytest.approx(8.0 * 63 + 120 * local.token_ms)


def test_every_cut_is_a_way(bundle: Bundle, profile: DecoderProfile) -> None:
    found = planned(bundle, profile, NEAR, disagreement=1.0)
    for codec, size in ((EXACT, 4), ("f16", 2), ("int8", 1)):
        splits = {way.cut: way for way in found.ways if way.mode == "split" and way.codec == codec}
        assert sorted(splits) == list(range(1, LAYERS))
        assert all(way.up_bytes == size * CONFIG.d_model + 100 for way in splits.values())
        # The cloud is eight times as fast: a layer more on the device costs seven eighths of its time.
        steps = [splits[k + 1].token_ms - splits[k].token_ms for k in range(1, LAYERS - 1)]
        assert steps == pytest.approx([8.75] * len(steps), rel=0.01)
        assert all(way.exact == (codec == EXACT) for way in splits.values())


def test_who_waits_for_the_other_side_computes_more_slowly(early: Bundle, profile: DecoderProfile) -> None:
    cold = msgspec.structs.replace(profile, apart=((10, 2.0),))
    assert [cold.slower(pause) for pause in (0.0, 5.0, 10.0, 99.0)] == [1.0, 1.5, 2.0, 2.0] and profile.slower(9.0) == 1
    warm_ways, cold_ways = ({way.name: way for way in planned(early, one, FAR).ways} for one in (profile, cold))
    for name, way in warm_ways.items():
        more_ms = cold_ways[name].token_ms - way.token_ms
        if way.mode in ("local", "stream"):
            assert more_ms == 0.0
        elif way.mode == "split":  # both sides, twice as long
            assert more_ms == pytest.approx(10.0 * way.cut + way.cloud_ms)
        elif way.mode == "verify" and not way.cut:  # a step of one row more for each question
            step_ms, rounds = way.cloud_ms, 2.0  # NGRAMS
            assert 0.0 < more_ms <= step_ms < rounds * step_ms
        else:
            assert more_ms > 0.0


def test_what_rounds_is_no_exact_way(bundle: Bundle, profile: DecoderProfile) -> None:
    found = planned(bundle, profile, NEAR)
    rounded = [way for way in found.ways if way.mode == "split" and way.codec != EXACT]
    assert rounded and all(way.fails.startswith("rounding turns some tokens") for way in rounded)
    for allowed, fails in ((0.05, True), (1.0, False)):  # how many is not known
        again = [way for way in planned(bundle, profile, NEAR, disagreement=allowed).ways if way.codec == "int8"]
        assert again and all(bool(way.fails) == fails for way in again)


def test_the_best_of_each_mode_comes_first_and_what_fails_last(bundle: Bundle, profile: DecoderProfile) -> None:
    found = planned(bundle, profile, FAR)
    modes = list(dict.fromkeys(way.mode for way in found.ways))
    for way, mode in zip(found.ways, modes, strict=False):
        same = [one for one in found.ways if one.mode == mode and bool(one.fails) == bool(way.fails)]
        assert way.mode == mode and way.total_ms == min(one.total_ms for one in same)
    assert {"local", "stream", "split", "verify"} <= set(modes)


def test_memory_bounds_what_the_device_holds(bundle: Bundle, profile: DecoderProfile) -> None:
    free = planned(bundle, profile, SLOW, times=0.5)
    whole = next(way for way in free.ways if way.mode == "local")
    tight = planned(bundle, profile, SLOW, times=0.5, memory_mb=whole.device_mb - 1e-3)
    local = next(way for way in tight.ways if way.mode == "local")
    assert "of 4 layers" in local.fails or "MB on the device" in local.fails
    assert all(way.fails for way in tight.ways if way.device_mb > whole.device_mb - 1e-3)
    assert not tight.ways[tight.best].fails


def test_an_answer_that_the_model_is_too_short_for(bundle: Bundle, profile: DecoderProfile) -> None:
    most = bundle.config.context_length
    planned(bundle, profile, FAR, tokens=most - 64)
    with pytest.raises(PlanError, match=f"longer than the model takes; give {most} or fewer"):
        planned(bundle, profile, FAR, tokens=most - 63)


def test_what_no_way_keeps_to(bundle: Bundle, profile: DecoderProfile) -> None:
    with pytest.raises(PlanError, match=r"no way keeps to what was asked for: .* ms a token, 0.001 wanted"):
        planned(bundle, profile, FAR, slo_ms=0.001)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"prompt": 0}, "0"),
        ({"tokens": 0}, "0 tokens"),
        ({"disagreement": 1.5}, "--max-disagreement is 1.5"),
        ({"memory_mb": -1.0}, "--memory-mb is -1"),
        ({"slo_ms": float("nan")}, "--slo-ms is nan"),
        ({"energy_j": 1.0}, "a budget of energy is given, and no watts"),
        ({"energy_j": -1.0, "device_watts": 1.0}, "--energy-j is -1"),
        ({"device_watts": float("inf")}, "inf watts are declared"),
        ({"percentile": 100.0}, "the percentile is 100"),
        ({"load": 1.0}, "others take 1 of the cloud's time"),
    ],
)
def test_wishes_that_cannot_be(asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Answer(**asked)


def test_a_profile_of_another_model_is_refused(bundle: Bundle, profile: DecoderProfile) -> None:
    other = msgspec.structs.replace(profile, model="ab" * 16)
    with pytest.raises(PlanError, match="the cloud's profile is of tiny"):
        plan(Setting(bundle, profile, other, 1.0, read_link(NEAR), Answer()))
    with pytest.raises(PlanError, match="0 times as fast"):
        planned(bundle, profile, NEAR, times=0.0)


def test_a_trace_is_known_as_questions_meet_it() -> None:
    steady = link_figures(Link(20.0, 5e6, 2e7))
    assert steady.trip_ms == steady.trip_high_ms == pytest.approx(20.0 + 0.16 + 0.056)  # of 100 bytes, and 140
    assert steady.up_low_bps == steady.up_bps == 5e6
    stalls = Trace((*range(1, 8_001), 10_000))  # two seconds of silence in ten
    changing = link_figures(Link(20.0, stalls, stalls))
    assert 20.0 <= changing.trip_ms < 24.0
    assert changing.up_bps == pytest.approx(8 * 1500 * 800, rel=0.01) and changing.up_low_bps < changing.up_bps
    assert changing.trip_high_ms < 500.0  # a stall delays few of the questions that are asked


def test_over_a_trace_answers_are_replayed_and_the_tail_counts(bundle: Bundle, profile: DecoderProfile) -> None:
    trace = "rtt=20,trace=synthetic"
    found = planned(bundle, profile, trace, disagreement=1.0)
    for way in found.ways:
        assert (way.tail_ms is None) == (way.mode == "local")
        assert way.tail_ms is None or way.tail_ms >= way.token_ms * 0.99
    split = next(way for way in found.ways if way.mode == "split" and way.exact)
    assert split.tail_ms is not None
    bound = (split.token_ms + split.tail_ms) / 2  # which the mean keeps to, and the percentile does not
    late = planned(bundle, profile, trace, slo_ms=bound)
    (same,) = [way for way in late.ways if way.name == split.name]
    assert f"at p95, {bound:g} wanted" in same.fails
    (median,) = [w for w in planned(bundle, profile, trace, slo_ms=bound, percentile=10.0).ways if w.name == split.name]
    assert not median.fails


def test_prices_and_replays_agree_where_nothing_changes(bundle: Bundle, profile: DecoderProfile) -> None:
    plain, steady = (
        planned(bundle, profile, "rtt=20,up=50,down=50", load=load, disagreement=1.0) for load in (0.0, 1e-9)
    )
    known = {way.name: way for way in steady.ways}
    for way in plain.ways:
        again = known[way.name]
        assert way.tail_ms is None and (again.tail_ms is not None or way.mode == "local")
        assert again.token_ms == pytest.approx(way.token_ms, rel=0.05), way.name
        assert again.total_ms == pytest.approx(way.total_ms, rel=0.06), way.name


@pytest.mark.parametrize("link", ["rtt=200,up=0.02,down=0.02", "rtt=20,up=0.05,down=1", "rtt=2,up=5,down=0.03"])
def test_a_slow_link_takes_as_long_replayed(bundle: Bundle, profile: DecoderProfile, link: str) -> None:
    plain, steady = (planned(bundle, profile, link, load=load, disagreement=1.0) for load in (0.0, 1e-9))
    known = {way.name: way for way in steady.ways}
    for way in plain.ways:
        assert known[way.name].total_ms == pytest.approx(way.total_ms, rel=0.25), way.name
    stream = next(way for way in steady.ways if way.mode == "stream")
    carried = read_link(link).rate().down_bps / 8e3 * stream.total_ms
    assert carried >= 120 * 35 and steady.ways[steady.best].name == plain.ways[plain.best].name


def test_the_link_carries_what_a_prompt_needs_once(bundle: Bundle, profile: DecoderProfile) -> None:
    found = planned(bundle, profile, "rtt=20,up=0.5,down=5", prompt=64)
    way = next(one for one in found.ways if (one.mode, one.cut, one.codec) == ("split", 1, "f32"))
    sent_ms = 63 * CONFIG.d_model * 4 * 8 / 500
    assert sent_ms < way.first_ms - way.token_ms < 1.5 * sent_ms


def test_a_busy_cloud_drives_work_away(bundle: Bundle, profile: DecoderProfile) -> None:
    free, busy = (planned(bundle, profile, FAR, load=load) for load in (0.0, 0.95))
    assert free.ways[free.best].mode == "stream" and busy.ways[busy.best].mode != "stream"


def test_energy_is_the_devices_own_and_bounds_ways(bundle: Bundle, profile: DecoderProfile) -> None:
    watts = {"device_watts": 2.0, "radio_watts": 1.0}
    found = planned(bundle, profile, FAR, **watts)
    local = next(way for way in found.ways if way.mode == "local")
    stream = next(way for way in found.ways if way.mode == "stream")
    assert local.energy_j == pytest.approx(2.0 * local.total_ms * 1e-3)
    assert stream.energy_j == pytest.approx(1.0 * stream.total_ms * 1e-3) and stream.device_ms == 0.0
    free, busy = (planned(bundle, profile, FAR, load=load, **watts) for load in (1e-9, 0.9))
    known = {way.name: way for way in free.ways}
    for way in busy.ways:  # waiting in the cloud is not on the link
        assert way.energy_j == pytest.approx(known[way.name].energy_j, rel=1e-3), way.name
    bounded = planned(bundle, profile, FAR, energy_j=local.energy_j * 0.99, **watts)
    again = next(way for way in bounded.ways if way.mode == "local")
    assert again.fails.endswith("J an answer, " + f"{local.energy_j * 0.99:g} wanted")
    assert bounded.ways[bounded.best].energy_j <= local.energy_j * 0.99


def test_rates_by_the_second() -> None:
    assert per_second(Trace((1, 500, 999, 1000, 2000))) == [48_000.0, 12_000.0]
    assert per_second(Trace((10, 20))) == [pytest.approx(2 * 1500 * 8 * 50)]


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"layers_ms": ()},
        {"layers_ms": ((2, 1.0), (1, 2.0))},
        {"rows_ms": ((1, -1.0),)},
        {"rows_ms": ((2, 1.0),)},
        {"prefill_row_ms": float("nan")},
        {"threads": 0},
        {"apart": ((3, 0.9),)},
        {"apart": ((3, float("inf")),)},
        {"apart": ((10, 2.0), (3, 2.0))},
        {"apart": ((0, 2.0),)},
        {"layers_cold_ms": ((1, 1.0),)},
        {"exits_ms": ((2, 1.0), (1, 1.0))},
        {"exits_cold_ms": ((2, 1.0),)},
        {"rests_ms": ((99, 1.0),)},
        {"rests_ms": ((1, 1.0),), "rests_cold_ms": ((2, 1.0),)},
        {"format": "isthmus-profile"},
    ],
)
def test_a_profile_that_cannot_be(profile: DecoderProfile, tmp_path: Path, changed: dict[str, Any]) -> None:
    told = msgspec.to_builtins(profile) | changed
    (tmp_path / "x.json").write_bytes(msgspec.json.encode(told))
    with pytest.raises(PlanError):
        load_decoder_profile(tmp_path / "x.json")


def test_a_profile_of_other_layers_is_refused(bundle: Bundle, profile: DecoderProfile) -> None:
    more = msgspec.structs.replace(profile, layers_ms=(*profile.layers_ms, (LAYERS + 1, 99.0)))
    for device, cloud in ((more, profile), (profile, more)):
        with pytest.raises(PlanError, match=f"has {LAYERS + 1} layers, and the model {LAYERS}"):
            plan(Setting(bundle, device, cloud, 1.0, read_link(FAR), Answer()))
    for times in (0.0, 1e-320, float("nan"), float("inf"), 1e9):
        with pytest.raises(PlanError, match="times as fast as the device"):
            plan(Setting(bundle, profile, profile, times, read_link(FAR), Answer()))


def test_an_exit_that_is_not_held_is_no_way(profile: DecoderProfile, tmp_path: Path) -> None:
    held = write_early(tmp_path / "tiny")
    profile = msgspec.structs.replace(profile, model=held.manifest.model_id)
    assert any(way.mode == "exit" for way in planned(held, profile, NEAR, disagreement=1.0).ways)
    (tmp_path / "tiny" / held.exits[0].file).unlink()
    found = planned(Bundle.open(tmp_path / "tiny"), profile, NEAR, disagreement=1.0)
    assert not any(way.mode == "exit" or "exit" in way.name for way in found.ways)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a certified exit before layer 2."""
    return write_early(tmp_path_factory.mktemp("early") / "tiny")


def test_an_exit_is_held_and_its_states_take_the_uplink(early: Bundle, profile: DecoderProfile) -> None:
    watts: dict[str, Any] = {"device_watts": 1.0, "radio_watts": 1.0, "disagreement": 0.05}
    found = planned(early, profile, NEAR, **watts)
    speaks = next(way for way in found.ways if way.mode == "exit")
    drafts = next(way for way in found.ways if way.mode == "verify" and way.cut == 2)
    split = next(way for way in found.ways if way.mode == "split" and way.cut == 2)
    size = early.manifest.files[early.exits[0].file].bytes
    for way in (speaks, drafts):
        assert way.device_mb > split.device_mb + size / 1e6
    bound = (split.device_mb + speaks.device_mb) / 2
    tight = planned(early, profile, NEAR, memory_mb=bound, disagreement=0.05)
    assert not next(way for way in tight.ways if way.name == split.name).fails
    assert all("MB on the device" in way.fails for way in tight.ways if way.mode == "exit")
    # 60 kbit/s carry a state of 43 bytes and its frame each 9 ms: fewer than are made; all of them go up.
    trace = Trace(tuple(range(200, 100_001, 200)))
    slow = plan(Setting(early, profile, profile, 8.0, Link(20.0, trace, trace), Answer(disagreement=0.05)))
    late = next(way for way in slow.ways if way.mode == "exit")
    assert late.token_ms > speaks.token_ms + 100.0


def test_no_exit_speaks_beyond_what_it_promises(early: Bundle, profile: DecoderProfile) -> None:
    found = planned(early, profile, NEAR, disagreement=0.04)
    assert all("a max disagreement of 0.05 allows that" in way.fails for way in found.ways if way.mode == "exit")
