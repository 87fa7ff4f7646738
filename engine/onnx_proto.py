"""The bytes of an ONNX model, so that a device needs onnxruntime but not the `onnx` package.

Only what decoder graphs use: nodes, float and int attributes, and initializers that are given to the session by
name instead of standing in the file. Field numbers are those of onnx.proto (https://github.com/onnx/onnx).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IR_VERSION = 9
OPSET = 18
MICROSOFT = "com.microsoft"

_ELEMENT = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int32): 6, np.dtype(np.int64): 7}


@dataclass(slots=True)
class Graph:
    """A graph under construction.

    Attributes:
        initializers: tensors by name that the session copies; the model only declares them.
        bound: float32 tensors by name that are inputs of the graph, so that sessions can share their memory.
    """

    initializers: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    bound: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    _constants: dict[str, bytes] = field(default_factory=dict)
    _nodes: list[bytes] = field(default_factory=list)
    _inputs: list[bytes] = field(default_factory=list)
    _outputs: list[bytes] = field(default_factory=list)

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: float,
    ) -> str:
        """Adds a node and gives its first output; "" stands for an input or output left out."""
        body = [_text(1, name) for name in inputs] + [_text(2, name) for name in outputs]
        body += [_text(3, outputs[0]), _text(4, op)]
        body += [_bytes(5, _attribute(name, value)) for name, value in attributes.items()]
        body.append(_text(7, domain))
        self._nodes.append(_bytes(1, b"".join(body)))
        return outputs[0]

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Declares an initializer; int64 ones (shapes, axes) are written into the model, which infers from them."""
        if value.dtype == np.int64:
            self._constants[name] = _tensor(name, value) + _bytes(9, value.tobytes())
        else:
            self.initializers[name] = value
            where = _bytes(13, _text(1, "location") + _text(2, "session"))
            self._constants[name] = _tensor(name, value) + where + _number(14, 1)
        return name

    def weight(self, name: str, value: NDArray[np.generic]) -> str:
        """Declares a weight f32 as an input."""
        self.bound[name] = value
        return self.input(name, np.float32, value.shape)

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """Declares an input; a dimension given by name may vary."""
        self._inputs.append(_bytes(11, _value_info(name, dtype, shape)))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """Declares an output."""
        self._outputs.append(_bytes(12, _value_info(name, dtype, shape)))
        return name

    def model(self) -> bytes:
        """The ModelProto."""
        declared = [_bytes(5, tensor) for tensor in self._constants.values()]
        graph = b"".join([*self._nodes, _text(2, "part"), *declared, *self._inputs, *self._outputs])
        opsets = [_bytes(8, _text(1, domain) + _number(2, v)) for domain, v in (("", OPSET), (MICROSOFT, 1))]
        return b"".join([_number(1, IR_VERSION), _text(2, "isthmus"), _bytes(7, graph), *opsets])


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _bytes(tag: int, value: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(value)) + value


def _text(tag: int, value: str) -> bytes:
    return _bytes(tag, value.encode())


def _attribute(name: str, value: float) -> bytes:
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, 2)
    return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)


def _value_info(name: str, dtype: type[np.generic], shape: Iterable[int | str]) -> bytes:
    dims = [_bytes(1, _number(1, d) if isinstance(d, int) else _text(2, d)) for d in shape]
    tensor = _number(1, _ELEMENT[np.dtype(dtype)]) + _bytes(2, b"".join(dims))
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _tensor(name: str, value: NDArray[np.generic]) -> bytes:
    dims = b"".join(_number(1, d) for d in value.shape)
    return dims + _number(2, _ELEMENT[value.dtype]) + _text(8, name)
