"""Writes sampler.json: what the numpy sampler chooses from logits that anyone can rebuild.

Logits of a case: x = start; for every id x = (1664525 x + 1013904223) mod 2^32 and the logit is
float32(scale) * float32(((x >> 8) >> drop << drop) - 2^23) * 2^-23, all products in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.sampler import exp64, gumbel, kept, log64, sample
from isthmus.engine.sampling import Sampling

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.5},
    {"temperature": 0.05},
    {"temperature": 50.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1e-40},
]
SHAPES = [(1, 1, 4.0, 0), (2, 17, 8.0, 0), (3, 1000, 12.0, 0), (4, 5003, 30.0, 18), (5, 5003, 6.0, 0)]
SEEDS = [(0, 0, 0), (1, 0, 5), (0xFEDCBA9876543210, 3, 4095), (2**64 - 1, 2**32 - 1, 2**32 - 1)]
POINTS = [2.0**-25, 1e-6, 0.1, 0.5, 0.7071067811865475, 0.7071067811865476, 0.999999, 1.0 - 2.0**-25, 1.0, 2.0, 17.33]


def logits(start: int, vocab: int, scale: float, drop: int) -> NDArray[np.float32]:
    """The logits [vocab] f32 of a case."""
    out, x = np.empty(vocab, np.float32), start
    for i in range(vocab):
        x = (1664525 * x + 1013904223) % 2**32
        out[i] = np.float32(scale) * np.float32((x >> 8 >> drop << drop) - 2**23) * np.float32(2.0**-23)
    return out


def case(shape: tuple[int, int, float, int], setting: dict[str, Any], keys: tuple[int, int, int]) -> dict[str, Any]:
    """One case with its answer: the token, how many tokens the filters keep, and the noise of id 0."""
    start, vocab, scale, drop = shape
    seed, stream, position = keys
    sampling = Sampling(seed=seed, stream=stream, **setting)
    values = logits(*shape)
    with np.errstate(all="ignore"):
        z = values * (np.float32(1) / np.float32(sampling.temperature))
    plain = sampling.temperature > 1e-30
    return {
        "start": start,
        "vocab": vocab,
        "scale": scale,
        "drop": drop,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": str(seed),
        "stream": stream,
        "position": position,
        "token": sample(values, sampling, position),
        "kept": len(kept(values, z, sampling)) if plain else 1,
        "noise0": float(gumbel(np.array([0]), sampling, position)[0]).hex(),
    }


def vectors() -> dict[str, Any]:
    """The whole file."""
    points = np.array(POINTS)
    shapes = [(s, setting, SEEDS[(i + j) % 4]) for i, s in enumerate(SHAPES) for j, setting in enumerate(SETTINGS)]
    shapes += [(SHAPES[4], SETTINGS[1], keys) for keys in SEEDS]
    return {
        "about": "logits by tests/vectors/make_sampler.py; doubles in C's %a notation",
        "log64": [[x.hex(), y.hex()] for x, y in zip(POINTS, log64(points).tolist(), strict=True)],
        "exp64": [[(-x).hex(), y.hex()] for x, y in zip(POINTS, exp64(-points).tolist(), strict=True)],
        "cases": [case(*arguments) for arguments in shapes],
    }


if __name__ == "__main__":
    made = vectors()
    lists = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, made[name])) + "\n ]" for name in list(made)[1:]]
    text = "{\n" + ",\n".join([f' "about": {json.dumps(made["about"])}', *lists]) + "\n}\n"
    Path(__file__).with_name("sampler.json").write_text(text)
