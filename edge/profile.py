"""How fast this device was the last time, kept in the user's cache folder: a beginning, which its own steps correct.

A profile is another one for another model, host, kind or number of processors, kernels that were asked for, number of
layers, or setting of the device; so there is nothing to invalidate by hand. It is written again when the device has
changed by a tenth.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

CHANGED = 0.1


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured.

    Attributes:
        ms_per_mb: of one row, for a megabyte of weights.
        row_ms: of one of many rows through the whole model.
            0 where none was seen.
        numerics: id of the engine's arithmetic.
        flash_mb_s: of experts that are read, in 10^6 bytes a second; 0 where none were.
    """

    ms_per_mb: float
    row_ms: float
    numerics: str
    flash_mb_s: float = 0.0

    def near(self, other: Profile) -> bool:
        """Whether the other says the same, nearly."""
        mine, others = ((one.ms_per_mb, one.row_ms, one.flash_mb_s) for one in (self, other))
        same = all(abs(a - b) <= CHANGED * a for a, b in zip(mine, others, strict=True))
        return same and self.numerics == other.numerics


def folder() -> Path | None:
    """Where profiles lie: in $ISTHMUS_CACHE, else in isthmus in $XDG_CACHE_HOME or ~/.cache; None without any."""
    with suppress(RuntimeError):
        if own := os.environ.get("ISTHMUS_CACHE"):
            return Path(own).expanduser() / "profiles"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "isthmus" / "profiles"
    return None


def name(model_id: str, *settings: object) -> str:
    """A profile's file name."""
    machine = (platform.node(), platform.machine(), os.cpu_count(), os.environ.get("ISTHMUS_CPU", ""))
    told = json.dumps([model_id, *map(str, (*machine, *settings))]).encode()
    return f"{hashlib.blake2b(told, digest_size=12).hexdigest()}.json"


def read(path: Path) -> Profile | None:
    """A profile; None where there is none, or nothing that one could be."""
    try:
        told = json.loads(path.read_text())
        numbers = [float(told[name]) for name in ("ms_per_mb", "row_ms")] + [float(told.get("flash_mb_s", 0.0))]
        found = Profile(numbers[0], numbers[1], str(told["numerics"]), numbers[2])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.ms_per_mb > 0 and all(isfinite(x) and 0 <= x < 1e6 for x in numbers) else None


def write(path: Path, profile: Profile) -> None:
    """Keeps a profile; a folder that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(asdict(profile)))
        partial.replace(path)
