"""Pictures as they travel: the bytes of a JPEG or WebP file, by Pillow.

A codec's name is "jpegN" or "webpN", N the quality from 1 to 100, or "webp-lossless". What travels so is one picture,
uint8 [1, height, width, 3], red first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError, ProtocolError

WEBP_LOSSLESS: Final = "webp-lossless"
_NAME: Final = re.compile(r"(jpeg|webp)([1-9][0-9]?|100)")
_SCAN: Final = b"\xff\xda"  # begins one in a JPEG; each walks through all of the picture
Picture = NDArray[np.uint8]


def names_picture(codec: str) -> bool:
    """Whether that is the name of a codec for pictures."""
    return codec == WEBP_LOSSLESS or _NAME.fullmatch(codec) is not None


def is_picture(dtype: np.dtype[Any], dims: Sequence[int]) -> bool:
    """Whether an array is one picture."""
    return dtype == np.uint8 and len(dims) == 4 and dims[0] == 1 and dims[3] == 3 and min(dims) > 0


def encode_picture(array: NDArray[Any], codec: str) -> bytes:
    """The file of a picture.

    Args:
        array: uint8 [1, height, width, 3].

    Raises:
        ProtocolError: Pillow cannot write a picture of that size.
    """
    found = _NAME.fullmatch(codec)
    how: dict[str, Any] = {"lossless": True} if found is None else {"quality": int(found[2])}
    data = io.BytesIO()
    try:
        pillow().fromarray(np.ascontiguousarray(array[0])).save(data, codec[:4].upper(), **how)
    except (OSError, ValueError) as error:
        raise ProtocolError(
            f"a picture of {array.shape[1:3]} cannot be sent as {codec}: {error}", "use another codec"
        ) from error
    return data.getvalue()


def decode_picture(data: memoryview, codec: str, dims: Sequence[int]) -> Picture:
    """The picture of a file, [1, height, width, 3].

    Raises:
        ProtocolError: it is no such file, or one of another size, or of several scans.
    """
    try:
        if bytes(data).count(_SCAN) > 1 and codec.startswith("jpeg"):
            raise ProtocolError("a JPEG of several scans came", "send a baseline one")
        with pillow().open(io.BytesIO(data), formats=(codec[:4].upper(),)) as opened:
            if (opened.height, opened.width) != tuple(dims[1:3]):  # before anything is unpacked
                size = f"{opened.height} x {opened.width}"
                raise ProtocolError(f"a picture of {size} came, not of {dims[1]} x {dims[2]}", "send one of that size")
            return np.asarray(opened.convert("RGB"))[None]
    except (ProtocolError, EngineError):
        raise
    except Exception as error:  # whatever a damaged file makes the library say
        raise ProtocolError(
            f"{len(data)} bytes are no {codec[:4].upper()} file", "the sender's picture is broken"
        ) from error


def pillow() -> Any:
    """`PIL.Image`.

    Raises:
        EngineError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise EngineError("Pillow is not installed, and pictures travel", "pip install pillow") from error
    return Image
