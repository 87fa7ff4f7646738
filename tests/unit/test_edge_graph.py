"""A network across a device and a cloud: outputs are the whole's wherever they come from, and silence stops nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from isthmus.cloud.graphs import load_graph
from isthmus.edge.events import Timeouts
from isthmus.edge.graph import GraphDevice
from isthmus.edge.graph_pace import BETTER, FIRST_MS, MOST_LOOK_S, GraphPace
from isthmus.protocol import messages as m
from isthmus.protocol.errors import BundleError, DeviceError, EngineError, LinkError, ProtocolError, ServiceError
from isthmus.protocol.features import UNIT
from isthmus.protocol.transport import Refused
from isthmus.split.bundle import is_graph
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_manifest import CLOUD, DEVICE
from isthmus.split.graph_writer import write_graph
from isthmus.split.transform import Components
from tests.edge_world import LossyWire
from tests.graph_world import GraphService, cut_network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def whole(bundle: Path) -> Callable[[Any], Any]:
    session = ort.InferenceSession(str(bundle.parent / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


@pytest.fixture
def cloud(bundle: Path) -> GraphService:
    return GraphService(load_graph(bundle, threads=1))


@pytest.fixture
def wire(cloud: GraphService) -> LossyWire:
    return LossyWire(cloud)  # type: ignore[arg-type]


def image(seed: int = 0, size: int = 8) -> Any:
    return np.random.default_rng(seed).standard_normal((1, 3, size, size)).astype(np.float32)


def device(bundle: Path | GraphBundle, wire: LossyWire | None = None, **options: Any) -> GraphDevice:
    return GraphDevice(bundle, wire=wire, threads=1, clock=time.monotonic if wire is None else wire.clock, **options)


def slow(one: GraphDevice, wire: LossyWire, seconds: float = 0.2) -> None:
    """Has the rest take so long here, by the link's clock."""
    rest = one.bundle.part(CLOUD, 1)

    class Slow:
        def run(self, known: Any) -> Any:
            wire.now += seconds
            return rest.run(known)

    one._rest = Slow()  # type: ignore[assignment]


def test_all_of_it_here_without_a_cloud(bundle: Path, whole: Callable[[Any], Any]) -> None:
    with device(bundle) as one:
        found = one.infer(image())
        assert list(found) == ["y"] and np.allclose(found["y"], whole(image()), atol=1e-6)
        assert one.stats.where == "device" and one.stats.bytes_up == 0 and one.stats.note == ""


@pytest.mark.parametrize("mode", ["auto", "split"])
def test_the_rest_in_the_cloud(bundle: Path, whole: Callable[[Any], Any], wire: LossyWire, mode: Any) -> None:
    with device(bundle, wire, mode=mode) as one:
        if mode == "auto":
            slow(one, wire)
        for seed in range(6):
            found = one.infer({"x": image(seed, 8 + seed)})
            assert np.allclose(found["y"], whole(image(seed, 8 + seed)), atol=1e-6)
            assert one.stats.where == "cloud" and one.stats.bytes_up > 500 and one.stats.together == 1


@pytest.mark.parametrize("codec", ["", "zstd"])
def test_all_of_it_in_the_cloud(tmp_path: Path, whole: Callable[[Any], Any], codec: str) -> None:
    folder = cut_network(tmp_path, end=0)
    assert sorted(GraphBundle.open(folder).manifest.files) == [CLOUD]
    wire = LossyWire(GraphService(load_graph(folder, threads=1)))  # type: ignore[arg-type]
    with device(folder, wire, mode="split", codec=codec) as one:
        assert np.allclose(one.infer(image())["y"], whole(image()), atol=1e-6)
        assert one.stats.where == "cloud" and one.stats.bytes_up > 700
    with device(folder) as one:
        assert np.allclose(one.infer(image())["y"], whole(image()), atol=1e-6) and one.stats.where == "device"


@pytest.mark.parametrize(("codec", "least"), [("f16", 1.9), ("int8", 4.0), ("int4", 7.0)])
def test_what_travels_coded_takes_fewer_bytes(
    bundle: Path, whole: Callable[[Any], Any], cloud: GraphService, codec: str, least: float
) -> None:
    x, sizes, found = image(size=32), list[int](), None
    for one in ("", codec):
        wire = LossyWire(cloud)  # type: ignore[arg-type]
        with device(bundle, wire, mode="split", codec=one) as running:
            found = running.infer(x)["y"]
            assert running.stats.where == "cloud"
            sizes.append(running.stats.bytes_up)
    assert sizes[0] > least * sizes[1]
    assert found is not None and np.abs(found - whole(x)).max() < 0.1 * np.abs(whole(x)).max()
    assert not np.array_equal(found, whole(x))


@pytest.mark.parametrize("patch", [1, 2])
def test_what_travels_by_components(bundle: Path, whole: Callable[[Any], Any], tmp_path: Path, patch: int) -> None:
    opened, x = GraphBundle.open(bundle), image(size=32)
    (tensor,) = opened.manifest.crossing
    features = [opened.part(DEVICE, 1).run({"x": image(seed, 32)})[tensor.name] for seed in range(4)]
    components = Components(tensor.name, 1, [np.asarray(one, np.float32) for one in features], patch)
    transform = components.coded(0.25 * components.spread)
    model, nodes = str(bundle.parent / "model.onnx"), list(range(6))
    told, sizes = msgspec.to_builtins([transform]), {"x": [1, 3, 32, 32]}
    write_graph(model, "", nodes, str(tmp_path / "cut"), shapes=sizes, codec=UNIT, transforms=told)
    wire = LossyWire(GraphService(load_graph(tmp_path / "cut", threads=1)))  # type: ignore[arg-type]
    with device(tmp_path / "cut", wire, mode="split") as one:
        found = one.infer(x)["y"]
        assert one.codec == UNIT and one.stats.where == "cloud" and 5 * one.stats.bytes_up < features[0].nbytes
    assert 0 < np.abs(found - whole(x)).max() < 0.1 * np.abs(whole(x)).max()
    with device(tmp_path / "cut") as alone:
        assert np.allclose(alone.infer(x)["y"], whole(x), atol=1e-4 * np.abs(whole(x)).max())


def test_a_codec_that_is_none(bundle: Path) -> None:
    with pytest.raises(DeviceError, match="this bundle has no transform"):
        device(bundle, codec="unit")
    with pytest.raises(DeviceError, match="the codec is 'int9'"):
        device(bundle, codec="int9")
    found = msgspec.structs.replace(GraphBundle.open(bundle).manifest, codec="ecsq4")
    with pytest.raises(BundleError, match="sends in the codec 'ecsq4'"):
        found.check()


@pytest.mark.parametrize("seed", range(8))
def test_a_bad_link_changes_no_output(
    bundle: Path, whole: Callable[[Any], Any], cloud: GraphService, seed: int
) -> None:
    wire = LossyWire(cloud, seed, drop=0.05, repeat=0.3, delay_s=(0.001, 0.4))  # type: ignore[arg-type]
    wire.reconnect_every = 5
    with device(bundle, wire) as one:
        slow(one, wire, 1.0)
        places = []
        for at in range(60):
            assert np.allclose(one.infer(image(at))["y"], whole(image(at)), atol=1e-6)
            places.append(one.stats.where)
        assert "cloud" in places


def test_a_cloud_that_is_gone_or_comes_late_or_back(
    bundle: Path, whole: Callable[[Any], Any], cloud: GraphService, wire: LossyWire
) -> None:
    with device(bundle, wire) as one:
        wire.cloud = None
        began = wire.now
        assert np.allclose(one.infer(image())["y"], whole(image()), atol=1e-6)
        assert one.stats.where == "device" and "went on alone" in one.stats.note
        assert wire.now - began <= FIRST_MS * 1e-3 + 0.3
        began = wire.now
        one.infer(image())
        assert wire.now - began <= 0.05  # it is not waited for again
        wire.cloud = cloud  # type: ignore[assignment]
        slow(one, wire)
        for _ in range(4):
            wire.now += 1.5 * MOST_LOOK_S
            one.infer(image())
        assert (one.stats.note, one.stats.where) == ("", "cloud")


@pytest.mark.parametrize("mode", ["auto", "split"])
@pytest.mark.parametrize("depth", [1, 3, 50])
def test_a_pipeline_gives_what_one_after_the_other_gives(
    bundle: Path, whole: Callable[[Any], Any], wire: LossyWire, mode: Any, depth: int
) -> None:
    wire.spoil(0.0, 0.0, (0.05, 0.05))
    images = [image(seed, 8 + seed % 3) for seed in range(12)]
    with device(bundle, wire, mode=mode) as one:
        began, wheres = wire.now, []
        sizes: dict[tuple[int, ...], set[int]] = {}
        for x, found in zip(images, one.stream(images, depth), strict=True):
            assert list(found) == ["y"] and np.allclose(found["y"], whole(x), atol=1e-6)
            wheres.append(one.stats.where)
            sizes.setdefault(x.shape, set()).add(one.stats.bytes_up)
            assert one.stats.bytes_down > 0
        assert wheres == ["cloud"] * 12
        assert all(len(same) == 1 and min(same) > 0 for same in sizes.values())  # each: what it sent itself
        assert wire.now - began <= 0.1 * (12 / depth + 2)  # and not a round trip for each
        assert np.allclose(one.infer(images[0])["y"], whole(images[0]), atol=1e-6)
        assert one._cloud is not None and not one._cloud._awaited and not one._cloud._news


def test_a_pipeline_outlives_its_cloud_and_a_lost_connection(
    bundle: Path, whole: Callable[[Any], Any], wire: LossyWire
) -> None:
    images = [image(seed) for seed in range(12)]
    for mode, away_s in (("auto", 0.3), ("auto", 1e9), ("split", 0.3)):
        with device(bundle, wire, mode=mode, timeouts=Timeouts(give_up_ms=2_000)) as one:
            wheres = []
            for at, found in enumerate(one.stream(images, 4)):
                assert np.allclose(found["y"], whole(images[at]), atol=1e-6)
                wheres.append(one.stats.where)
                if at == 3:
                    wire.dark.append((wire.now, wire.now + away_s))
                    wire.reconnect()
            assert wheres[:4] == ["cloud"] * 4 and len(wheres) == 12
            assert wheres[-1] == {("auto", 1e9): "device", ("split", 0.3): "cloud"}.get((mode, away_s), wheres[-1])
        wire.dark.clear()


def test_a_cloud_that_was_started_again_with_the_network_is_found(
    bundle: Path, whole: Callable[[Any], Any], cloud: GraphService, wire: LossyWire
) -> None:
    class Restarted:
        """Knows nothing of a device that greeted the one before it, and says so."""

        greeted = False

        def receive(self, message: Any) -> list[tuple[float, Any]]:
            self.greeted |= isinstance(message, m.Hello)
            if not self.greeted:
                wire.reconnect()
                return []
            return cloud.receive(message)

        forget = cloud.forget

    class Empty:
        def receive(self, message: Any) -> list[tuple[float, Any]]:
            if isinstance(message, m.Ping):
                return [(0.0, m.Pong(message.sent_us))]
            answers = cloud.receive(message)
            return [(delay, msgspec.structs.replace(answer, graphs=())) for delay, answer in answers]

        forget = cloud.forget

    wire.cloud = Empty()  # type: ignore[assignment]
    with device(bundle, wire, mode="split") as one:
        for _ in range(2):
            began = wire.now
            with pytest.raises(ServiceError, match="serves no network"):
                one.infer(image())
            assert wire.now - began < 1.0  # it says so itself
        wire.cloud = Restarted()  # type: ignore[assignment]
        assert np.allclose(one.infer(image())["y"], whole(image()), atol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "split"])
@pytest.mark.parametrize("error", [ProtocolError("no message", "update"), Refused("the key is unknown", "allow it")])
def test_a_pipeline_meets_nonsense(
    bundle: Path, whole: Callable[[Any], Any], wire: LossyWire, monkeypatch: pytest.MonkeyPatch, mode: Any, error: Any
) -> None:
    images, taken = [image(seed) for seed in range(8)], wire.receive

    def nonsense(timeout_ms: float) -> Any:
        raise error

    with device(bundle, wire, mode=mode) as one:
        outputs = one.stream(images, 3)
        assert np.allclose(next(outputs)["y"], whole(images[0]), atol=1e-6)
        monkeypatch.setattr(wire, "receive", nonsense)
        if mode == "split":
            with pytest.raises(LinkError, match=r"nonsense|key is unknown"):
                list(outputs)
            return
        assert np.allclose(next(outputs)["y"], whole(images[1]), atol=1e-6)
        assert one.stats.where == "device" and error.problem in one.stats.note
        monkeypatch.setattr(wire, "receive", taken)
        assert all(np.allclose(found["y"], whole(x), atol=1e-6) for found, x in zip(outputs, images[2:], strict=True))


@pytest.mark.parametrize("mode", ["auto", "split"])
def test_a_pipeline_does_not_wait_for_ever_for_a_busy_cloud(
    bundle: Path, whole: Callable[[Any], Any], cloud: GraphService, wire: LossyWire, mode: Any
) -> None:
    class Busy:
        def receive(self, message: Any) -> list[tuple[float, Any]]:
            if not isinstance(message, m.Infer):
                return cloud.receive(message)
            return [(0.0, m.Fault(m.Code.BUSY, "full", "later", 50, request=message.request))]

        forget = cloud.forget

    wire.cloud = Busy()  # type: ignore[assignment]
    with device(bundle, wire, mode=mode, timeouts=Timeouts(progress_ms=3_000)) as one:
        began, found = wire.now, one.stream([image()] * 3, 2)
        if mode == "split":
            with pytest.raises(LinkError, match="did not answer in time"):
                list(found)
        else:
            assert all(np.allclose(y["y"], whole(image()), atol=1e-6) for y in found) and one.stats.where == "device"
        assert wire.now - began < 20.0


def test_a_pipeline_says_what_cannot_be(bundle: Path, wire: LossyWire) -> None:
    with device(bundle, wire, mode="split") as one:
        with pytest.raises(DeviceError, match="depth is 0"):
            next(one.stream([image()], 0))
        with pytest.raises(DeviceError, match="has no input 'z'"):
            list(one.stream([{"z": image()}]))
        wire.cloud = None
        with pytest.raises(LinkError):
            list(one.stream([image()] * 3))
    with device(bundle) as one:
        assert len(list(one.stream([image()] * 3))) == 3 and one.stats.where == "device"


def test_split_mode_insists(bundle: Path, wire: LossyWire, cloud: GraphService) -> None:
    with device(bundle, wire, mode="split") as one:
        one.infer(image())
        wire.cloud = None
        with pytest.raises(LinkError, match=r"did not answer|does not answer"):
            one.infer(image())


def test_a_device_that_holds_its_part_only(bundle: Path, tmp_path: Path, wire: LossyWire) -> None:
    part = tmp_path / "part"
    (part / "device").mkdir(parents=True)
    for name in ("bundle.json", "device/model.onnx"):
        (part / name).write_bytes((bundle / name).read_bytes())
    with pytest.raises(DeviceError, match="the device's part only"):
        device(part)
    with device(part, wire) as one:
        assert one.infer(image())["y"].shape == (1, 16) and one.stats.where == "cloud"
        wire.cloud = None
        with pytest.raises(LinkError):
            one.infer(image())


def test_a_cloud_without_this_network(bundle: Path, tmp_path: Path) -> None:
    other = GraphService(load_graph(cut_network(tmp_path, 3), threads=1))
    with device(bundle, LossyWire(other)) as one:  # type: ignore[arg-type]
        one.infer(image())
        assert one.stats.where == "device" and "not this bundle" in one.stats.note
    with device(bundle, LossyWire(other), mode="split") as one, pytest.raises(ServiceError, match="not this bundle"):  # type: ignore[arg-type]
        one.infer(image())


def test_a_cloud_that_answers_nonsense(bundle: Path, whole: Callable[[Any], Any], wire: LossyWire) -> None:
    honest: Any = wire.cloud

    class Liar:
        def receive(self, message: Any) -> list[tuple[float, Any]]:
            told = honest.receive(message)
            return [
                (s, m.Inferred(a.request, a.shapes, a.data[:-1], 1, 1) if isinstance(a, m.Inferred) else a)
                for s, a in told
            ]

    wire.cloud = liar = Liar()  # type: ignore[assignment]
    with device(bundle, wire) as one:
        for at in range(3):
            assert np.allclose(one.infer(image(at))["y"], whole(image(at)), atol=1e-6)
    again = LossyWire(liar)  # type: ignore[arg-type]
    with device(bundle, again, mode="split") as one, pytest.raises(LinkError, match="answers nonsense"):
        one.infer(image())


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "input 'x' is absent; give float32 \\[any, 3, any, any\\]"),
        ({"x": np.zeros((1, 4, 8, 8), np.float32)}, "input 'x' is float32 \\[1, 4, 8, 8\\]"),
        ({"x": np.zeros((1, 3, 8, 8), np.complex64)}, "complex64"),
        ({"x": np.zeros((1, 3, 8, 8)), "z": 1}, "no input 'z'"),
        (np.zeros(3), "float32 \\[3\\]"),
    ],
)
def test_what_is_no_input(bundle: Path, given: Any, problem: str) -> None:
    with device(bundle) as one, pytest.raises(DeviceError, match=problem):
        one.infer(given)


def test_what_cannot_be_run_is_an_error_and_the_next_one_runs(bundle: Path) -> None:
    with device(bundle) as one:
        with pytest.raises(EngineError, match="cannot be run on that"):
            one.infer(np.zeros((1, 3, 0, 8), np.float32))
        assert one.infer(image())["y"].shape == (1, 16)


def test_refused_before_anything_is_run(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the mode is 'fast'"):
        device(bundle, mode="fast")
    with pytest.raises(DeviceError, match="split mode needs a cloud"):
        device(bundle, mode="split")
    with pytest.raises(BundleError, match="holds no bundle"):
        device(tmp_path)
    told = json.loads((bundle / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(told | {"kind": "decoder"}))
    with pytest.raises(BundleError, match=r"of a language model; open it with isthmus\.edge\.Device"):
        device(tmp_path)


def test_an_altered_file_is_not_run(bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    for name in ("bundle.json", "device/model.onnx", "cloud/model.onnx"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes((bundle / name).read_bytes())
    data = bytearray((copied / "device" / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "device" / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        device(copied)
    (copied / "device" / "model.onnx").write_bytes(bytes(data[:-1]))
    with pytest.raises(BundleError, match="bytes, not"):
        device(copied)


def test_which_folders_hold_networks(bundle: Path, tmp_path: Path) -> None:
    assert is_graph(bundle)
    (tmp_path / "bundle.json").write_text(json.dumps({"kind": "decoder"}))
    assert not is_graph(tmp_path)
    (tmp_path / "bundle.json").write_text("{")
    assert not is_graph(tmp_path)


class Trial:
    """Times of both places, as a device would see them."""

    def __init__(self, here: float, there: float) -> None:
        self.pace, self.here, self.there, self.now = GraphPace(True), here, there, 0.0

    def play(self, runs: int) -> list[str]:
        places: list[str] = []
        for _ in range(runs):
            places.append(self.pace.place(self.now))
            if places[-1] == "there":
                self.now += self.there * 1e-3
                self.pace.there(self.there)
            else:
                self.now += self.here * 1e-3
                self.pace.here(self.here)
                if places[-1] == "both":
                    self.pace.raced(self.now, self.there <= self.here)
        return places


def test_the_faster_place_is_found_and_followed() -> None:
    near = Trial(here=100.0, there=20.0)
    places = near.play(300)
    assert places[:2] == ["both", "both"] and "here" not in places  # the first run here was a cold one
    assert 2 < places.count("both") < 6
    far = Trial(here=20.0, there=100.0)
    places = far.play(600)
    assert "there" not in places and 2 < places.count("both") < 6  # it is looked at now and then, and then less
    far.there = 5.0
    places = far.play(3600)
    assert places[-1] == "there" and "here" not in places[-500:]
    far.there = 20.0 / BETTER - 1.0
    assert "here" not in far.play(50)  # not worth a change


def test_a_device_that_was_cold_is_timed_again() -> None:
    trial = Trial(here=120.0, there=60.0)
    trial.play(1)
    trial.here = 15.0
    assert trial.play(40)[-1] == "here"


def test_what_holds_one_part_only_has_no_choice() -> None:
    pace = GraphPace(False)
    pace.missed(1.0)
    assert pace.place(2.0) == "there"
