"""Writes rans.json beside it, with the coder's Python form: what any other language must read and write.

usage: python tests/vectors/make_rans.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from isthmus.protocol import features, rans

ABOUT = (
    "printed by tests/vectors/make_rans.py; the formats are in protocol/rans.py and protocol/features.py. Values are "
    "float32, written as C99 hexadecimal floats"
)


def main() -> None:
    """Writes the file."""
    rans.native = lambda: None
    chance = np.random.default_rng(2013)
    streams = []
    for about, codes, symbols in (
        ("one symbol only", np.zeros(9, np.uint8), 1),
        ("two symbols in turn", np.arange(10, dtype=np.uint8) % 2, 2),
        ("a rare symbol", np.array([0] * 30 + [3] + [0] * 8, np.uint8), 4),
        ("sixteen symbols", chance.binomial(15, 0.4, 50).astype(np.uint8), 16),
        ("all symbols", chance.permutation(256).astype(np.uint8), 256),
    ):
        table = rans.frequencies(np.bincount(codes, minlength=symbols).astype(np.int64))
        stream = rans.encode(codes, table).hex()
        streams.append({"about": about, "codes": codes.tolist(), "frequencies": table.tolist(), "stream": stream})
    arrays = []
    values = chance.standard_normal((3, 20)).astype(np.float32)
    for about, codec, array in (
        ("normal, int4", "int4", values),
        ("rectified, int2", "int2", np.maximum(values, 0.0)),
        ("normal, int8", "int8", values[0]),
        ("constant", "int3", np.full((2, 2), 0.1, np.float32)),
        ("halves", "f16", values[:1]),
        ("without values", "int4", np.empty((0, 3), np.float32)),
        ("normal, half a bit more", "int4.5", values),
        ("whole numbers nearby", "unit", 3 * values),
        ("more than 256 whole numbers", "unit", np.array([-300, 0.4, 7.5, 299], np.float32)),
    ):
        data = features.encode(array, codec)
        back = features.decode(memoryview(data), codec, array.dtype, array.shape)
        told = [one.hex() for one in back.reshape(-1).astype(float).tolist()]
        arrays.append({"about": about, "codec": codec, "dims": list(array.shape), "data": data.hex(), "values": told})
    found = {"about": ABOUT, "streams": streams, "arrays": arrays}
    (Path(__file__).parent / "rans.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
