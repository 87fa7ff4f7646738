"""What travels when a network is cut in two: arrays up, arrays down; part of `protocol.messages`.

Nothing is kept between two requests. A message's `data` follows as a raw second frame when it is more than
`messages.INLINE_BYTES`.
"""

from __future__ import annotations

from msgspec import Struct

from isthmus.protocol.arrays import Shapes
from isthmus.protocol.fields import U32, Micros, Name


class Infer(Struct, array_like=True, tag=24):
    """Device -> cloud: runs the second part once; answered by an Inferred, or a Fault that names the request.

    Attributes:
        request: from 1 on, chosen by the device; repeating one runs it again.
        model_id: hex.
        shapes: of what travels, in the order in which the bundle lists it.
        data: the bytes of these arrays.
        budget_ms: from receipt until the answer must be sent, 0 for no deadline.
    """

    request: U32
    model_id: Name
    shapes: Shapes
    data: bytes = b""
    budget_ms: U32 = 0


class Inferred(Struct, array_like=True, tag=25):
    """Cloud -> device: what came of an Infer.

    Attributes:
        shapes, data: of the outputs that the second part makes, in the bundle's order.
        engine_us: time in the engine, microseconds, of all requests that were run together.
        queue_us: from receipt to its beginning, microseconds.
        together: requests that were run as one.
    """

    request: U32
    shapes: Shapes
    data: bytes = b""
    engine_us: Micros = 0
    queue_us: Micros = 0
    together: U32 = 1
