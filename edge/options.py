"""Settings of a device and of one generation, each checked where it comes in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from operator import index
from typing import Any, Literal, Protocol, cast, get_args

from isthmus.edge.figures import Prefer, Wish
from isthmus.edge.token import MODES, Mode
from isthmus.engine.config import DecoderConfig
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol import tensors
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import MAX_DRAFT

CODECS = tensors.CODECS + tensors.ENTROPY_CODECS
KV_TOKENS = 4096
MAX_DEPTH = 64  # blocks of drafts under way
MOST = 2**31 - 1  # what the engine and the protocol count to
Overflow = Literal["error", "slide"]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How one answer is made.

    Attributes:
        max_tokens: tokens at most, the end-of-sequence token included.
        sampling: how tokens are chosen.
        stop: words that end the text and do not appear in it.
        mode: "auto", "local", "stream", "split", "verify" or "exit".
        cut: layer before which the hidden states leave the device in split mode; None for the middle.
        codec: how hidden states travel: one of `CODECS`; empty for the mode's own (f16 in split; in exit mode
            what the exit was calibrated with, else ecsq6).
        threshold: confidence from which on exit mode believes the exit; 1 for never, None for what its
            certificate says.
        guesses: tokens that exit mode goes on for before it asks, at most; 0 asks about each that it is not sure of.
    """

    max_tokens: int = 256
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    mode: Mode = "local"
    cut: int | None = None
    codec: str = ""
    threshold: float | None = None
    guesses: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        told: dict[str, Any] = asdict(self)
        return told

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> GenerateOptions:
        """From what `to_dict` gave."""
        return cls(**{**told, "sampling": Sampling(**told["sampling"]), "stop": tuple(told["stop"])})

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1, MOST)
        if self.sampling.top_k > MOST:
            raise DeviceError(f"top_k is {self.sampling.top_k}", f"choose 0 (all) to {MOST}")
        if self.mode not in MODES:
            raise DeviceError(f"mode is {self.mode!r}", f"choose one of {', '.join(MODES)}")
        if self.codec and self.codec not in CODECS:
            raise DeviceError(f"codec is {self.codec!r}", f"choose one of {', '.join(CODECS)}")
        if self.threshold is not None and not (is_number(self.threshold) and 0.0 <= self.threshold <= 1.0):
            raise DeviceError(f"the threshold is {shown(self.threshold)}", "choose a confidence in 0..1")
        if self.guesses is not None:
            check_whole("guesses", self.guesses, 0, MAX_DRAFT - 1)
        if any(not word for word in self.stop):
            raise DeviceError("a stop word is empty", "leave it out or give it letters")


def is_number(value: object) -> bool:
    """Whether it is one, of any kind."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value in a message."""
    return f"{value:g}" if isinstance(value, float) else repr(value)


def check_whole(name: str, value: object, least: int, most: int = MOST) -> None:
    """Makes sure of a whole number in [least, most].

    Raises:
        DeviceError: it is none.
    """
    if not hasattr(value, "__index__") or not least <= index(value) <= most:
        remedy = f"choose a whole number from {least} on" if most == MOST else f"choose one in {least}..{most}"
        raise DeviceError(f"{name} is {value!r}", remedy)


def check_device(overflow: object, on_rollback: object, threads: object, draft_depth: object) -> None:
    """Checks what a device is opened with and no generation changes.

    Raises:
        DeviceError: it cannot be so.
    """
    if overflow not in get_args(Overflow):
        raise DeviceError(f"overflow is {overflow!r}", "choose error or slide")
    if not callable(on_rollback) and on_rollback not in ("replace", "keep"):
        raise DeviceError(f"on_rollback is {on_rollback!r}", "choose replace, keep, or give a function")
    check_whole("threads", threads, 0)
    check_whole("draft_depth", draft_depth, 1, MAX_DEPTH)


def stop_words(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop word, or several.

    Raises:
        DeviceError: something is no word.
    """
    words = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
    if not all(isinstance(word, str) for word in words):
        raise DeviceError(f"stop is {stop!r}", "give a word, or a list of words")
    return words


def as_mode(mode: str) -> Mode:
    """A mode's name, checked."""
    if mode not in MODES:
        raise DeviceError(f"mode is {mode!r}", f"choose one of {', '.join(MODES)}")
    return mode


def as_wish(prefer: str, max_disagreement: float, mode: str, own: bool = False) -> Wish:
    """What the user wishes, checked.

    Args:
        own: see `Wish`.

    Raises:
        DeviceError: no such wish, no share, or a mode that goes against it.
    """
    if not is_number(max_disagreement):
        raise DeviceError(f"max_disagreement is {max_disagreement!r}", "choose a share in 0..1")
    wish = Wish(cast(Prefer, prefer), max_disagreement, own)
    if own and mode != "auto":
        raise DeviceError(f"experts ask the cloud as auto sees fit, and the mode is {mode}", "leave the mode out")
    if own and prefer != "speed":
        raise DeviceError(f"experts ask the cloud when they are slow, and {prefer} is preferred", "prefer speed")
    if prefer == "privacy" and mode not in ("auto", "local"):
        raise DeviceError(f"{mode} mode sends something and privacy is preferred", "use mode local, or prefer speed")
    return wish


def alone_refused(held: int, n_layers: int) -> DeviceError:
    """Why a device cannot keep everything to itself."""
    return DeviceError(
        f"the device holds {held} of {n_layers} layers and nothing may be sent",
        "give it all layers of the bundle, or prefer speed",
    )


class Layered(Protocol):
    """What says how many layers a model has: its configuration, or a cloud's offer."""

    @property
    def n_layers(self) -> int: ...


def check_cut(cut: int, model: Layered) -> int:
    """A cut that leaves both sides a layer.

    Raises:
        DeviceError: any other.
    """
    last = model.n_layers - 1
    if not 1 <= cut <= last:
        raise DeviceError(f"cut is {cut} and the model has {last + 1} layers", f"choose one in 1..{last}")
    return cut


def middle_cut(model: Layered) -> int:
    """Where a model is cut when nobody says where."""
    return max(1, model.n_layers // 2)


def layers_wanted(model: Layered, mode: Mode, cut: int | None, held: int | None = None) -> int:
    """Layers that a device needs at once.

    Args:
        mode: what it begins with; in "auto" the cloud answers, so a device that has a bundle needs no more of it
            unless a cut was named, and one that has none gets the whole model.
        cut: the layer before which hidden states leave it, None for what it holds, or the middle.
        held: leading layers that its bundle holds, None when there is no bundle yet.

    Raises:
        DeviceError: no such cut.
    """
    if cut is not None:
        check_cut(cut, model)
    if mode in ("stream", "verify"):
        return 0
    if mode == "local" or (mode == "auto" and held is None):
        return model.n_layers
    if cut is not None:
        return cut
    return middle_cut(model) if mode == "split" and not held else 0


def check_memory(memory_mb: float | None) -> float | None:
    """A memory limit in 10^6 bytes, None for none.

    Raises:
        DeviceError: no positive number.
    """
    if memory_mb is not None and not (is_number(memory_mb) and 0 < memory_mb < math.inf):
        raise DeviceError(
            f"memory_mb is {shown(memory_mb)}", "give a positive number of megabytes, or none for no limit"
        )
    return memory_mb


def kv_room(kv_tokens: int | None, config: DecoderConfig) -> int:
    """Positions of KV to hold: what was asked for, or the model's context up to 4,096."""
    if kv_tokens is None:
        return min(config.context_length, KV_TOKENS)
    check_whole("kv_tokens", kv_tokens, 1)
    if kv_tokens > config.context_length:
        raise DeviceError(
            f"kv_tokens is {kv_tokens} and the model's context {config.context_length} tokens",
            f"choose one in 1..{config.context_length}",
        )
    return kv_tokens
