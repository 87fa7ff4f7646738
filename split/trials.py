"""How often a network answers as before when what travels is coded, and how many bytes that takes: tried on inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol import features
from isthmus.protocol.arrays import MAX_ARRAYS
from isthmus.protocol.errors import ProtocolError
from isthmus.split.agreement import Agree
from isthmus.split.graph_exits import NONE, Leaving
from isthmus.split.onnx_graph import OnnxGraph, declared
from isthmus.split.onnx_measure import learn, outputs, session
from isthmus.split.pictures import OF_FORMAT, Picture, Preprocess, smallest
from isthmus.split.transform import SEGMENTS, Components, Transform, axis_of, patches_of
from isthmus.split.travels import Feeds, Nodes, Travels, same

CODECS = (*reversed(features.STEPS), "f16", "zstd")  # the smallest first
STEPS_AN_OCTAVE, STEP_RANGE = 4, (-17, 6)  # of a component, against the spread of all: nothing finer, nothing coarser
FURTHER = 3  # steps beyond the first that is too coarse: a few answers more or less are chance
TINY = 1e-20


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of sending something in a codec.

    Attributes:
        agreement: share of answers that stayed the same.
        bytes: of an input on the wire, on average.
        plain_bytes: of the same as it is.
        encode_ms, decode_ms: of an input, on this machine.
        transforms: what is done with tensors before they are coded, and undone behind.
    """

    codec: str
    agreement: float
    bytes: float
    plain_bytes: float
    encode_ms: float
    decode_ms: float
    transforms: tuple[Transform, ...] = ()


class Trials:
    """See the module.

    Args:
        file: of the model, beside which weights may lie.
        inputs: each one as the network takes it.
        least: agreement that is wanted.
        agree: see `agreement.share`.

    Attributes:
        answers: of the whole network to each input, in the order of its outputs.
    """

    def __init__(
        self, graph: OnnxGraph, file: Path, inputs: Sequence[Feeds], least: float, agree: Agree = "top1"
    ) -> None:
        self._graph, self._file, self._inputs = graph, file, inputs
        self.least, self._agree = least, agree
        self._declared = declared(graph.model)
        learn(graph, file, inputs[0])
        self._whole = session(graph.model, file, 0)
        self.answers = [outputs(self._whole, one) for one in inputs]

    def smallest(self, nodes: Nodes, leaving: Leaving = NONE) -> Tried:
        """The codec of the fewest bytes that keeps the answers of a cut; what travels as it is, where none does.

        Args:
            nodes: those on the device.
            leaving: where inputs leave before anything travels; their answers count, too.

        Raises:
            PlanError: no cut, or no input gets as far.
        """
        travels = self._travels(nodes, leaving)
        plain = travels.plain_bytes
        best = Tried("", travels.plain_agreement, plain, plain, 0.0, 0.0)
        for codec in CODECS:
            found = travels.coded(codec)
            if found is None or found[0][0] >= best.bytes:
                continue
            (size, encode_ms, decode_ms), came = found
            if (kept := travels.agreement(came, self.least)) >= self.least:
                best = Tried(codec, kept, size, plain, encode_ms, decode_ms)
        patches = [
            self._patches(name, [arrays[at] for arrays in travels.arrays]) for at, name in enumerate(travels.names)
        ]
        for patch in sorted({patch for some in patches for patch in some}):
            coarsest = self._coarsest(travels, patches, patch)
            if coarsest is not None and coarsest.bytes < best.bytes:
                best = coarsest
        return best

    def again(self, nodes: Nodes, tried: Tried) -> Tried:
        """A codec that was chosen on other inputs, on these: what it really takes and keeps."""
        travels = self._travels(nodes)
        places = {travels.names.index(one.tensor): one for one in tried.transforms}
        found = travels.transformed(places) if places else travels.coded(tried.codec) if tried.codec else None
        if found is None:
            return Tried("", travels.plain_agreement, travels.plain_bytes, travels.plain_bytes, 0.0, 0.0)
        costs, came = found
        size, plain = costs[0], travels.plain_bytes
        return Tried(tried.codec, travels.agreement(came), size, plain, *costs[1:], tried.transforms)

    def _travels(self, nodes: Nodes, leaving: Leaving = NONE) -> Travels:
        return Travels(self._graph, self._file, nodes, self._inputs, self.answers, self._agree, leaving)

    def _coarsest(self, travels: Travels, patches: Sequence[Sequence[int]], patch: int) -> Tried | None:
        """The largest step of components that keeps the answers; None where some of what travels has none.

        Args:
            patches: sizes of patches that each tensor can be made of, none where it has no components.
            patch: of components; where a tensor cannot be made of such, the next smaller one.
        """
        arrays, takes = travels.arrays, travels.names
        floats = [at for at, array in enumerate(arrays[0]) if array.dtype.kind == "f"]
        if not floats or not all(patches[at] for at in floats):
            return None
        found = dict[int, Components]()
        for at in floats:
            side, axis = max(one for one in patches[at] if one <= patch), axis_of(arrays[0][at])
            assert axis is not None
            some = SEGMENTS if len(floats) * SEGMENTS < MAX_ARRAYS else max(1, (MAX_ARRAYS - len(takes)) // len(floats))
            found[at] = Components(takes[at], axis, [one[at] for one in arrays], side, some)

        def tried(exponent: int) -> Tried | None:
            width = 2.0 ** (exponent / STEPS_AN_OCTAVE)
            steps = {at: one.coded(max(TINY, one.spread * width)) for at, one in found.items()}
            try:
                (size, encode_ms, decode_ms), came = travels.transformed(steps)
            except ProtocolError:  # more than a message takes
                return None
            if (kept := travels.agreement(came, self.least)) < self.least:
                return None
            return Tried(features.UNIT, kept, size, travels.plain_bytes, encode_ms, decode_ms, tuple(steps.values()))

        best: Tried | None = None
        fine, coarse = STEP_RANGE
        while coarse - fine > 1:
            middle = (fine + coarse) // 2
            one = tried(middle)
            best, fine, coarse = (one, middle, coarse) if one is not None else (best, fine, middle)
        for further in range(coarse + 1, coarse + 1 + FURTHER) if best is not None else ():
            best = tried(further) or best
        return best

    def _patches(self, name: str, arrays: Sequence[Any]) -> list[int]:
        """Sizes of patches that a tensor's components may have; none where the next input's may be of other channels.

        Args:
            arrays: it, for each input.
        """
        axis, dims = axis_of(arrays[0]), self._declared.get(name, [])
        if name in self._graph.inputs or axis is None or len(dims) != arrays[0].ndim or not dims[axis]:
            return []
        if any(one.shape[1:] != arrays[0].shape[1:] or not one.size or not np.isfinite(one).all() for one in arrays):
            return []
        return patches_of(arrays[0].shape) if all(dims[1:]) else [1]

    def images(self, pictures: list[Picture], preprocess: Preprocess, name: str) -> list[Tried]:
        """The smallest JPEG and WebP that keep the answers of the whole network; the best of each where none does.

        Args:
            pictures: those that the inputs were made of.
            name: of the input that is the picture.
        """

        def agrees(back: list[Picture]) -> float:
            shares = []
            for picture, feeds, whole in zip(back, self._inputs, self.answers, strict=True):
                found = outputs(self._whole, {**feeds, name: preprocess.array(picture)})
                shares.append(same(self._graph, found, whole, self._agree))
            return float(np.mean(shares))

        found = []
        for format in OF_FORMAT:
            sent = smallest(pictures, format, agrees, self.least)
            rest = sum(np.asarray(value).nbytes for other, value in self._inputs[0].items() if other != name)
            size, plain = rest + float(np.mean(sent.sizes)), rest + float(np.mean([one.nbytes for one in pictures]))
            found.append(Tried(sent.codec, agrees(sent.pictures), size, plain, sent.encode_ms, sent.decode_ms))
        return found
