"""How often a network answers as before when what travels is coded, and how many bytes that takes: tried on inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol import features
from isthmus.protocol.arrays import DTYPES, MAX_ARRAYS, pack, unpack
from isthmus.protocol.errors import PlanError, ProtocolError
from isthmus.split.agreement import Agree, share
from isthmus.split.graph_exits import NONE, Leaving
from isthmus.split.onnx_graph import OnnxGraph, declared
from isthmus.split.onnx_measure import learn, outputs, session
from isthmus.split.pictures import OF_FORMAT, Picture, Preprocess, smallest
from isthmus.split.transform import SEGMENTS, Components, Transform, axis_of, patches_of

CODECS = (*reversed(features.STEPS), "f16", "zstd")  # the smallest first
STEPS_AN_OCTAVE, STEP_RANGE = 4, (-17, 6)  # of a component, against the spread of all: nothing finer, nothing coarser
FURTHER = 3  # steps beyond the first that is too coarse: a few answers more or less are chance
TINY = 1e-20
PART_BYTES = 25  # in the message, of one more tensor
Nodes = tuple[int, ...]
Feeds = Mapping[str, Any]


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
        asking = [at for at in range(len(self._inputs)) if leaving.asks(at)]
        if not asking:
            raise PlanError("every input leaves at an exit", "raise its confidence")
        halves = self._graph.halves(nodes)
        first, second = session(halves.device, self._file, 0), session(halves.cloud, self._file, 0)
        takes = [one.name for one in second.get_inputs()]
        travels, kept = list[list[Any]](), list[Feeds]()
        for feeds in (self._inputs[at] for at in asking):
            made = dict(zip([one.name for one in first.get_outputs()], _ran(first, feeds), strict=True))
            travels.append([_array(name, {**feeds, **made}[name]) for name in takes])
            kept.append({name: made[name] for name in halves.kept if name in made})
        gives = [one.name for one in second.get_outputs()]
        plain = float(np.mean([sum(one.nbytes for one in arrays) for arrays in travels]))
        best = Tried("", 1.0 - leaving.lost() / len(self._inputs), plain, plain, 0.0, 0.0)

        def agreement(came: Sequence[Sequence[Any]]) -> float:
            lost, most = leaving.lost(), (1.0 - self.least) * len(self._inputs)
            for at, arrays, own in zip(asking, came, kept, strict=True):
                told = {**own, **dict(zip(gives, _ran(second, dict(zip(takes, arrays, strict=True))), strict=True))}
                lost += 1.0 - self._same([told.get(name) for name in self._graph.outputs], self.answers[at])
                if lost > most + 1e-9:
                    return 0.0  # too many have changed
            return 1.0 - lost / len(self._inputs)

        for codec in CODECS:
            found = self._tried(codec, travels)
            if found is None or found[0][0] >= best.bytes:
                continue
            (size, encode_ms, decode_ms), came = found
            if (same := agreement(came)) >= self.least:
                best = Tried(codec, same, size, plain, encode_ms, decode_ms)
        patches = [self._patches(name, [arrays[at] for arrays in travels]) for at, name in enumerate(takes)]
        for patch in sorted({patch for some in patches for patch in some}):
            coarsest = self._coarsest(travels, takes, patches, patch, agreement)
            if coarsest is not None and coarsest.bytes < best.bytes:
                best = coarsest
        return best

    def _coarsest(
        self,
        travels: Sequence[Sequence[Any]],
        takes: Sequence[str],
        patches: Sequence[Sequence[int]],
        patch: int,
        agreement: Callable[[list[list[Any]]], float],
    ) -> Tried | None:
        """The largest step of components that keeps the answers; None where some of what travels has none.

        Args:
            patches: sizes of patches that each tensor can be made of, none where it has no components.
            patch: of components; where a tensor cannot be made of such, the next smaller one.
        """
        floats = [at for at, array in enumerate(travels[0]) if array.dtype.kind == "f"]
        if not floats or not all(patches[at] for at in floats):
            return None
        found = dict[int, Components]()
        for at in floats:
            side, axis = max(one for one in patches[at] if one <= patch), axis_of(travels[0][at])
            assert axis is not None
            some = SEGMENTS if len(floats) * SEGMENTS < MAX_ARRAYS else max(1, (MAX_ARRAYS - len(takes)) // len(floats))
            found[at] = Components(takes[at], axis, [arrays[at] for arrays in travels], side, some)
        plain = float(np.mean([sum(one.nbytes for one in arrays) for arrays in travels]))

        def tried(exponent: int) -> Tried | None:
            width = 2.0 ** (exponent / STEPS_AN_OCTAVE)
            steps = {at: one.coded(max(TINY, one.spread * width)) for at, one in found.items()}
            try:
                (size, encode_ms, decode_ms), came = self._units(steps, travels)
            except ProtocolError:  # more than a message takes
                return None
            same = agreement(came)
            if same < self.least:
                return None
            return Tried(features.UNIT, same, size, plain, encode_ms, decode_ms, tuple(steps.values()))

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
                shares.append(self._same(found, whole))
            return float(np.mean(shares))

        found = []
        for format in OF_FORMAT:
            sent = smallest(pictures, format, agrees, self.least)
            rest = sum(np.asarray(value).nbytes for other, value in self._inputs[0].items() if other != name)
            size, plain = rest + float(np.mean(sent.sizes)), rest + float(np.mean([one.nbytes for one in pictures]))
            found.append(Tried(sent.codec, agrees(sent.pictures), size, plain, sent.encode_ms, sent.decode_ms))
        return found

    def _tried(
        self, codec: str, travels: Sequence[Sequence[Any]]
    ) -> tuple[tuple[float, float, float], list[list[Any]]] | None:
        """Mean bytes, ms to encode and to decode, and what comes out; None where the codec cannot carry it."""
        sizes, encode_s, decode_s, came = list[int](), list[float](), list[float](), list[list[Any]]()
        for arrays in travels:
            used = [features.applies(codec, array.dtype, array.shape) for array in arrays]
            began = time.perf_counter()
            try:
                parts = [features.encode(array, one) for array, one in zip(arrays, used, strict=True)]
            except ProtocolError:
                return None
            encoded = time.perf_counter()
            came.append(
                [
                    features.decode(memoryview(part), one, array.dtype, array.shape)
                    for part, one, array in zip(parts, used, arrays, strict=True)
                ]
            )
            decode_s.append(time.perf_counter() - encoded)
            encode_s.append(encoded - began)
            sizes.append(sum(map(len, parts)))
        return (float(np.mean(sizes)), float(np.median(encode_s)) * 1e3, float(np.median(decode_s)) * 1e3), came

    def _units(
        self, transforms: Mapping[int, Transform], travels: Sequence[Sequence[Any]]
    ) -> tuple[tuple[float, float, float], list[list[Any]]]:
        """See `_tried`; for tensors by their place, transformed."""
        sizes, encode_s, decode_s, came = list[int](), list[float](), list[float](), list[list[Any]]()
        for arrays in travels:
            began = time.perf_counter()
            split = [transforms[at].split(one) if at in transforms else [one] for at, one in enumerate(arrays)]
            shapes, data = pack([part for parts in split for part in parts], features.UNIT)
            encoded = time.perf_counter()
            back: Iterator[Any] = iter(unpack(shapes, data))
            parts = [[next(back) for _ in one] for one in split]
            came.append([transforms[at].joined(one) if at in transforms else one[0] for at, one in enumerate(parts)])
            decode_s.append(time.perf_counter() - encoded)
            encode_s.append(encoded - began)
            sizes.append(len(data) + PART_BYTES * (len(shapes) - len(arrays)))
        return (float(np.mean(sizes)), float(np.median(encode_s)) * 1e3, float(np.median(decode_s)) * 1e3), came

    def _same(self, mine: Sequence[Any], whole: Sequence[Any]) -> float:
        """The share of an input's answers that are the same: of the output that fares worst."""
        pairs = zip(self._graph.outputs, mine, whole, strict=True)
        return min((share(a, b, self._agree) for name, a, b in pairs if name not in self._graph.inputs), default=1.0)


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        raise PlanError(f"{name!r} is no array of numbers, which could travel", "cut it elsewhere")
    return value


def _ran(running: Any, feeds: Feeds) -> list[Any]:
    try:
        return list(outputs(running, {one.name: feeds[one.name] for one in running.get_inputs()}))
    except KeyError as error:
        raise PlanError(f"a part needs {error}, which nothing makes", "choose another way") from error
