"""What one inference took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(slots=True)
class GraphStats:
    """What one inference took.

    Attributes:
        where: "cloud" where the rest was run there, "device" where all was run here.
        exit: the output at which it ended; "" for none.
        device_ms: of the first part.
        rest_ms: from then on to the outputs.
        cloud_ms, queue_ms: the cloud's engine, and the time before it began; 0 where no answer came.
        bytes_up, bytes_down: of the arrays that travelled, as they were coded.
        together: requests of devices that the cloud ran as one.
        note: what did not go as it should.
    """

    where: Literal["cloud", "device"] = "device"
    exit: str = ""
    device_ms: float = 0.0
    rest_ms: float = 0.0
    cloud_ms: float = 0.0
    queue_ms: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    together: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)
