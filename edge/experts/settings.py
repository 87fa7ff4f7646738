"""How a device holds the experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, get_args

from isthmus.edge.options import is_number
from isthmus.protocol.errors import DeviceError

ExpertMode = Literal["exact", "bounded", "cloud"]
MODES: tuple[ExpertMode, ...] = get_args(ExpertMode)
PLANES_OF = {0: 0, 2: 1, 4: 2, 8: 3}  # of nested experts, by bits; 0 for all
MOST_MB = 1e9  # more than any machine has


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """See `Device`.

    Attributes:
        mb: memory that experts may take, in 10^6 bytes.
        bits: 2, 4 or 8: nested experts are read with so many bits at most; 0 for all that are there.
        flash_mb_s: pretends that flash reads so many 10^6 bytes a second; 0 for what it does.
        mode: "exact", as if all experts were in memory; "bounded", where each is read with as few bits as the
            bundle's tolerance allows; or "cloud", exact as well: this device answers by itself while a token waits for
            experts for less than a round trip to the cloud takes; where it waits longer, whoever ends first answers.
        placement: a file of `isthmus experts place`, whose experts of memory are read before the first
            token; None for none.
    """

    mb: float
    bits: int = 0
    flash_mb_s: float = 0.0
    mode: ExpertMode = "exact"
    placement: Path | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.mb) and 0 < self.mb <= MOST_MB):
            raise DeviceError(f"expert_mb is {self.mb!r}", "give a positive number of megabytes")
        if self.bits not in PLANES_OF:
            raise DeviceError(f"expert_bits is {self.bits}", "choose 2, 4 or 8, or 0 for all")
        if not (is_number(self.flash_mb_s) and 0 <= self.flash_mb_s < inf):
            raise DeviceError(
                f"flash_mb_s is {self.flash_mb_s!r}", "give a number of megabytes a second, 0 for no limit"
            )

        if self.mode not in MODES:
            raise DeviceError(f"experts are to be read {self.mode!r}", f"choose one of {', '.join(MODES)}")

    @property
    def budget(self) -> int:
        """In bytes."""
        return int(self.mb * 1e6)

    @property
    def planes(self) -> int:
        """Leading planes of nested experts that are used at most; 0 for all."""
        return PLANES_OF[self.bits]
