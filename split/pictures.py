"""Pictures as a network takes them: resized, cut out, scaled; and as a JPEG or WebP that is sent in their place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.protocol.pictures import WEBP_LOSSLESS, decode_picture, encode_picture
from isthmus.split.files import open_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
LOSSLESS = 101  # the quality after the highest, of formats that have it
QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 100)
OF_FORMAT = {"JPEG": QUALITIES, "WebP": (*QUALITIES, LOSSLESS)}
MAX_PIXELS = 100_000_000
Picture = NDArray[np.uint8]  # [height, width, 3]


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done with a picture before the network; a JSON file says it.

    Attributes:
        size: [height, width] that the network takes.
        resize: the shorter side before a cut from the middle; 0 to bring the whole picture to `size`.
        mean, std: of each channel, of values 0 to 255: value = (pixel - mean) / std.
        layout: of the array, with a first dimension of one picture.
        channels: their order.
        dtype: "uint8" for pixels as they are, which `mean` and `std` then leave alone.
        input: the network's input that is the picture; "" for its only one.
    """

    size: tuple[int, int]
    resize: int = 0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    input: str = ""

    def __post_init__(self) -> None:
        if not all(1 <= side <= 8192 for side in self.size) or not 0 <= self.resize <= 8192:
            raise PlanError(
                f"pictures of {self.size} after a resize to {self.resize}", "give sides of 1 to 8192 pixels"
            )
        if self.resize and self.resize < max(self.size):
            raise PlanError(f"{self.size} cannot be cut out of {self.resize} pixels", "give a larger resize, or none")
        if not all(np.isfinite(self.mean)) or not all(0.0 < one < np.inf for one in self.std):
            raise PlanError(f"mean {self.mean} and std {self.std}", "give numbers; those of std above 0")

    def shown(self, path: Path) -> Picture:
        """A file's picture in the network's size.

        Raises:
            PlanError: no picture.
        """
        from PIL import Image

        height, width = self.size
        picture = _opened(path)
        if not self.resize:
            return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
        scale = self.resize / min(picture.size)
        across, down = (max(self.resize, round(side * scale)) for side in picture.size)
        picture = picture.resize((across, down), Image.Resampling.BILINEAR)
        left, top = (across - width) // 2, (down - height) // 2
        return np.asarray(picture.crop((left, top, left + width, top + height)))

    def array(self, picture: Picture) -> NDArray[np.generic]:
        """What the network is given of it."""
        pixels = picture if self.channels == "RGB" else picture[:, :, ::-1]
        if self.dtype == "uint8":
            found: NDArray[np.generic] = pixels
        else:
            scaled = (pixels.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
            found = scaled.astype(self.dtype)
        if self.layout == "NCHW":
            found = found.transpose(2, 0, 1)
        return np.ascontiguousarray(found[None])


def read_preprocess(path: Path) -> Preprocess:
    """From a JSON file.

    Raises:
        PlanError: it says something else.
    """
    try:
        with open_regular(path) as file:
            return msgspec.json.decode(file.read(1 << 20), type=Preprocess)
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror})", "name a JSON file") from error
    except msgspec.MsgspecError as error:
        raise PlanError(f"{path} is no preprocessing: {error}", _EXAMPLE) from error


@dataclass(frozen=True, slots=True)
class Sent:
    """Pictures as they come out of a codec.

    Attributes:
        codec: as `protocol.pictures` has it.
        sizes: bytes of each.
        encode_ms, decode_ms: of one.
    """

    codec: str
    pictures: list[Picture]
    sizes: list[int]
    encode_ms: float
    decode_ms: float


def coded(pictures: list[Picture], format: str, quality: int) -> Sent:
    """Pictures sent as JPEG or WebP of a quality, or `LOSSLESS`."""
    codec = WEBP_LOSSLESS if quality == LOSSLESS else f"{format.lower()}{quality}"
    back, sizes, encode_s, decode_s = list[Picture](), list[int](), list[float](), list[float]()
    for one in pictures:
        began = time.perf_counter()
        data = encode_picture(one[None], codec)
        encode_s.append(time.perf_counter() - began)
        sizes.append(len(data))
        began = time.perf_counter()
        back.append(decode_picture(memoryview(data), codec, (1, *one.shape))[0])
        decode_s.append(time.perf_counter() - began)
    ms = (statistics.median(took) * 1e3 for took in (encode_s, decode_s))
    return Sent(codec, back, sizes, *ms)


def called(codec: str) -> str:
    """A codec for pictures, for people: as "JPEG 90"."""
    rest = codec[4:].lstrip("-")
    return f"{next(one for one in OF_FORMAT if one.lower() == codec[:4])} {rest}"


def smallest(pictures: list[Picture], format: str, agrees: Callable[[list[Picture]], float], least: float) -> Sent:
    """The lowest quality with which answers agree often enough; the highest where none does.

    Args:
        agrees: the share of pictures, as they came out, that are answered as before.
    """
    qualities = OF_FORMAT[format]
    low, high = 0, len(qualities) - 1  # the agreement rises with the quality
    while low < high:
        middle = (low + high) // 2
        if agrees(coded(pictures, format, qualities[middle]).pictures) >= least:
            high = middle
        else:
            low = middle + 1
    return coded(pictures, format, qualities[high])


def found_in(folder: Path, most: int) -> list[Path]:
    """Files of pictures, in the order of their names; of more than `most`, some of all parts.

    Raises:
        PlanError: there are none.
    """
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise PlanError(f"{folder} cannot be read ({error.strerror})", "name a folder") from error
    if not names:
        raise PlanError(f"{folder} has no pictures", f"put some there: {', '.join(SUFFIXES)}")
    return list(_spread(names, most))


def _spread(names: list[Path], most: int) -> Iterator[Path]:
    count = min(most, len(names))
    return (names[at * len(names) // count] for at in range(count))


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with open_regular(path) as file, Image.open(file, formats=("JPEG", "PNG", "WEBP", "BMP", "PPM")) as found:
            if found.width * found.height > MAX_PIXELS:
                raise PlanError(f"{path} has {found.width} x {found.height} pixels", f"give at most {MAX_PIXELS:,}")
            return found.convert("RGB")
    except Image.DecompressionBombError as error:
        raise PlanError(f"{path} has too many pixels", f"give at most {MAX_PIXELS:,}") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise PlanError(f"{path} is no picture that can be read", "take it out of the folder") from error


_EXAMPLE = 'write {"size": [224, 224], "resize": 256, "mean": [127, 127, 127], "std": [128, 128, 128]}'
