"""Codecs tried on inputs: the smallest that keeps the answers, by top-1 or by values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from isthmus.protocol.errors import PlanError
from isthmus.split.agreement import share
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.profile import TensorSize
from isthmus.split.trial_inputs import MOST, read_inputs
from isthmus.split.trials import Trials, Tried
from tests.unit.test_split_onnx_measure import CHANNELS, convolutions

SIZES = {"x": TensorSize("float32", (1, 3, 16, 16), 3072)}
CUT = tuple(range(6))  # behind the second block


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutions(), str(path))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for at in range(6):
        small = chance.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(folder / f"{at}.png")
    (tmp_path / "how.json").write_text('{"size": [16, 16], "mean": [127, 127, 127], "std": [64, 64, 64]}')
    return folder


def trials(model: Path, folder: Path, least: float, agree: Any = "top1") -> Trials:
    graph = OnnxGraph(read_model(model))
    inputs = read_inputs(folder, graph, SIZES, str(model.parent / "how.json"))
    return Trials(graph, model, inputs.feeds, least, agree)


def test_a_stricter_wish_takes_more_bytes(model: Path, pictures: Path) -> None:
    found = [
        trials(model, pictures, least, agree).smallest(CUT)
        for least, agree in ((0.0, "top1"), (1.0, "top1"), (1.0, "values"))
    ]
    assert found[0].bytes <= found[1].bytes < found[2].bytes
    assert all(one.agreement >= least for one, least in zip(found, (0.0, 1.0, 1.0), strict=True))
    assert found[2].codec not in ("", "int2") and all(bool(one.transforms) == (one.codec == "unit") for one in found)
    assert found[2].bytes < found[2].plain_bytes
    assert 0 < found[2].encode_ms < 1000 and 0 < found[2].decode_ms < 1000


def fixed(path: Path) -> Path:
    """The model, taking pictures of one size only."""
    found = onnx.load(str(path))
    for dim, size in zip(found.graph.input[0].type.tensor_type.shape.dim, (1, 3, 16, 16), strict=True):
        dim.dim_value = size
    onnx.save_model(found, str(path))
    return path


def test_neighbours_are_put_together_where_all_sizes_are_known(model: Path, pictures: Path) -> None:
    open_ = trials(model, pictures, 1.0, "values")
    loose = open_.smallest(CUT)
    tight = trials(fixed(model), pictures, 1.0, "values")
    found = tight.smallest(CUT)
    assert all(one.patch == 1 for one in loose.transforms) and found.bytes <= loose.bytes
    good = [np.ones((1, CHANNELS, 16, 16), np.float32)] * 2
    (name,) = OnnxGraph(read_model(model)).crossing(CUT)
    assert tight._patches(name, good) == [1, 2, 4] and open_._patches(name, good) == [1]
    broken = np.full(good[0].shape, np.nan, np.float32)
    for strange in (broken, good[0][:, :, :8], good[0][:0]):
        assert tight._patches(name, [good[0], strange]) == []


def test_an_input_that_travels_as_well_has_no_components(model: Path, pictures: Path) -> None:
    found = onnx.load(str(fixed(model)))
    found.graph.node.append(onnx.helper.make_node("ReduceSum", ["x"], ["all of x"], keepdims=0))
    found.graph.node.append(onnx.helper.make_node("Add", [found.graph.output[0].name, "all of x"], ["with x"]))
    found.graph.output[0].name = "with x"
    onnx.save_model(found, str(model))
    one = trials(model, pictures, 1.0, "values").smallest(CUT)
    assert not one.transforms and one.codec not in ("", "unit")


def test_a_picture_is_sent_as_small_as_the_answers_allow(model: Path, pictures: Path) -> None:
    graph = OnnxGraph(read_model(model))
    inputs = read_inputs(pictures, graph, SIZES, str(model.parent / "how.json"))
    assert inputs.preprocess is not None and inputs.name == "x" and len(inputs.pictures) == 6
    strict, easy = (Trials(graph, model, inputs.feeds, least) for least in (1.0, 0.0))
    for one, other in zip(
        strict.images(inputs.pictures, inputs.preprocess, "x"),
        easy.images(inputs.pictures, inputs.preprocess, "x"),
        strict=True,
    ):
        assert other.codec[:4] == one.codec[:4] and other.codec[4:] == "5"
        assert other.bytes <= one.bytes < 768 * 3


@pytest.mark.parametrize("least", [0.0, 1.0])
def test_a_codec_that_was_chosen_is_judged_on_other_inputs(model: Path, pictures: Path, least: float) -> None:
    graph = OnnxGraph(read_model(model))
    feeds = read_inputs(pictures, graph, SIZES, str(model.parent / "how.json")).feeds
    choosing, others = (Trials(graph, model, some, least, "values") for some in (feeds[:3], feeds[3:]))
    chosen = choosing.smallest(CUT)
    same, held = choosing.again(CUT, chosen), others.again(CUT, chosen)
    assert (same.agreement, same.bytes, same.plain_bytes) == (chosen.agreement, chosen.bytes, chosen.plain_bytes)
    assert held.codec == chosen.codec and held.bytes != chosen.bytes and 0.0 <= held.agreement <= 1.0
    plain = Tried("", 1.0, 1.0, 1.0, 0.0, 0.0)
    assert others.again(CUT, plain).agreement == 1.0 and others.again(CUT, plain).bytes == held.plain_bytes


def test_what_is_no_cut_is_refused(model: Path, pictures: Path) -> None:
    with pytest.raises(PlanError):
        trials(model, pictures, 1.0).smallest((5, 6))


def test_shares() -> None:
    whole = np.array([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]], np.float32)
    other = np.array([[1.0, 2.9, 2.0], [5.0, 6.0, 0.0]], np.float32)
    assert share(other, whole, "top1") == 0.5
    assert share(other, whole, "values") == pytest.approx(4 / 6)
    assert share(whole, whole, "values") == 1.0
    assert share(np.array([1, 2]), np.array([1, 3]), "top1") == 0.5
    assert share(whole[:1], whole, "top1") == 0.0
    assert share(["a"], ["a"], "top1") == 1.0 and share(["a"], ["b"], "top1") == 0.0
    assert share(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), "top1") == 1.0
    assert share(np.array([0.5], np.float32), np.array([0.5], np.float32), "top1") == 1.0


def test_arrays_from_a_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    graph = OnnxGraph(read_model(model))
    with pytest.raises(PlanError, match=r"no \.npz files"):
        read_inputs(folder, graph, SIZES)
    for at in range(MOST + 6):
        np.savez(folder / f"{at:03}.npz", x=np.full((1, 3, 16, 16), at, np.float32))
    found = read_inputs(folder, graph, SIZES)
    assert len(found.feeds) == MOST and not found.pictures and found.feeds[-1]["x"][0, 0, 0, 0] > MOST
    np.savez(folder / "000.npz", x=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(PlanError, match=r"000\.npz gives 'x' as float32 \[1, 3, 8, 8\]"):
        read_inputs(folder, graph, SIZES)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ('{"size": [16, 16], "input": "z"}', "no input 'z'"),
        ('{"size": [8, 16]}', r"gives 'x' as float32 \[1, 3, 8, 16\]"),
        ('{"size": [16, 16], "layout": "NHWC"}', r"gives 'x' as float32 \[1, 16, 16, 3\]"),
        ('{"size": [16, 16], "dtype": "uint8"}', "gives 'x' as uint8"),
    ],
)
def test_pictures_that_do_not_fit(model: Path, pictures: Path, how: str, problem: str) -> None:
    (pictures.parent / "how.json").write_text(how)
    with pytest.raises(PlanError, match=problem):
        trials(model, pictures, 1.0)


def test_pictures_need_a_preprocessing_and_a_folder(model: Path, pictures: Path) -> None:
    graph = OnnxGraph(read_model(model))
    with pytest.raises(PlanError, match="has pictures"):
        read_inputs(pictures, graph, SIZES)
    with pytest.raises(PlanError, match="there is no folder"):
        read_inputs(pictures / "none", graph, SIZES)
