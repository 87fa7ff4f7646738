"""What is known of a mixture on this machine: how fast its flash and its steps are, and how its routers choose.

Both are kept in the user's cache folder beside the profiles of `edge.profile`. A file is another one for another model,
host, kind or number of processors, kernels, number of threads, width of experts or file system (routing: for another
model, host or processor); what a file says is held against that, and a file that is damaged counts as none, so that it
is measured anew.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from isthmus.edge import profile
from isthmus.edge.experts.flash import FlashSpeed
from isthmus.edge.experts.forecast import Steps
from isthmus.edge.experts.store import MAX_PLANES
from isthmus.engine.binding import default_threads
from isthmus.engine.config import DecoderConfig
from isthmus.engine.routing import Routing, RoutingFile
from isthmus.protocol.errors import BundleError, EngineError
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import Records
from isthmus.split.files import read_regular, write_whole
from isthmus.split.manifest import EMBEDDING, HEAD, layer_file

VERSION = 1
SMALL = 262_144  # bytes: experts of smaller planes are computed together with the others of their row
MOST_BYTES = 256 << 20  # of a file that is read
_NUMBERS = ("flash_mb_s", "latency_ms", "token_ms", "wait_ms", "read_ms")
_MOST = 1e9  # more than any figure is


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of a model on this machine.

    Attributes:
        flash_mb_s: 10^6 bytes a second of several reads of experts at once, past the page cache where `direct`.
        latency_ms: what a single one takes beyond its bytes at that speed.
        token_ms: of a decoded token with all experts in memory.
        wait_ms: what it costs beyond the waiting itself when a layer waits for reads.
        read_ms: what a read costs the step that computes meanwhile.
    """

    flash_mb_s: float
    latency_ms: float
    token_ms: float
    wait_ms: float
    read_ms: float
    direct: bool

    def speed(self, limit_mb_s: float = 0.0) -> FlashSpeed:
        """Of the flash, or of a slower one that is emulated; a limit of 0 is none."""
        return FlashSpeed(self.flash_mb_s, self.latency_ms, limit_mb_s or float("inf"))


def steps_of(bundle: Bundle, planes: int, facts: Facts) -> Steps:
    """Where a token's time goes: computing is as long as its weights are large.

    Args:
        planes: leading planes of experts that are used at most; 0 for all.

    Raises:
        BundleError: experts of a layer are absent.
    """
    config, files = bundle.config, bundle.manifest.files
    experts = config.experts
    assert experts is not None
    records = expert_records(bundle)
    sizes = {layer: sum(used_planes(one, planes)) for layer, one in records.items()}
    before, after, each = [0.0], float(files[EMBEDDING if config.tied else HEAD].bytes), list[float]()
    for layer in range(config.n_layers):
        before[-1] += files[layer_file(layer)].bytes
        if layer in records:
            each.append(sizes[layer])
            before.append(0.0)
    after += before.pop()  # layers behind the last one that has experts
    ms = facts.token_ms / (sum(before) + experts.top_k * sum(each) + after)
    largest = max(max(used_planes(one, planes)) for one in records.values())
    return Steps(
        before_ms=tuple(ms * size for size in before),
        expert_ms=tuple(ms * size for size in each),
        after_ms=ms * after,
        wait_ms=facts.wait_ms,
        read_ms=facts.read_ms,
        sizes=tuple(sizes.values()),
        small=largest < SMALL,
        follows=tuple(layer - 1 in records for layer in records),
    )


def expert_records(bundle: Bundle) -> dict[int, Records]:
    """Of every layer that has experts.

    Raises:
        BundleError: a layer is not here.
    """
    config = bundle.config
    if bundle.held_layers < config.n_layers:
        raise BundleError(
            f"{bundle.path} holds layers [0, {bundle.held_layers}) of {config.n_layers}",
            "all are needed: fetch the rest from the cloud, or split the model again",
        )
    return {layer: bundle.records(layer) for layer in range(config.n_layers) if config.experts_of(layer)}


def used_planes(records: Records, planes: int) -> tuple[int, ...]:
    """Bytes of the planes of an expert that are used; see `steps_of`."""
    return records.plane_sizes[: planes or len(records.plane_sizes)]


def facts_file(bundle: Bundle, planes: int, threads: int, limit_mb_s: float = 0.0) -> Path | None:
    """Where facts are kept; None without a cache folder. Arguments as in `read_facts`."""
    machine = planes or MAX_PLANES, threads or default_threads(), bundle.path.stat().st_dev, float(limit_mb_s)
    return _file(bundle, ".json", "expert facts", VERSION, *machine)


def routing_file(bundle: Bundle) -> Path | None:
    """Where routing is kept; None without a cache folder."""
    return _file(bundle, ".npz", "expert routing", VERSION)


def _file(bundle: Bundle, suffix: str, *settings: object) -> Path | None:
    folder = profile.folder()
    return None if folder is None else folder / Path(profile.name(bundle.model_id, *settings)).with_suffix(suffix)


def write_facts(bundle: Bundle, planes: int, threads: int, facts: Facts, limit_mb_s: float = 0.0) -> None:
    """Keeps facts; a folder that cannot be written is no error. Arguments as in `read_facts`."""
    told = {"version": VERSION, "model_id": bundle.model_id, **asdict(facts)}
    _write(facts_file(bundle, planes, threads, limit_mb_s), json.dumps(told).encode())


def read_facts(bundle: Bundle, planes: int, threads: int, limit_mb_s: float = 0.0) -> Facts | None:
    """Facts that were kept; None where there are none, or nothing that could be some.

    Args:
        planes: as in `steps_of`.
        threads: of the engine, 0 for one a core.
        limit_mb_s: of a slower flash that is emulated; where nothing was measured with it, facts without it are given.
    """
    if limit_mb_s and (own := _read_facts(bundle, facts_file(bundle, planes, threads, limit_mb_s))):
        return own
    return _read_facts(bundle, facts_file(bundle, planes, threads))


def _read_facts(bundle: Bundle, path: Path | None) -> Facts | None:
    data = _read(path)
    try:
        told = json.loads(data)
        mb_s, latency, token, wait, read = numbers = [float(told[name]) for name in _NUMBERS]
        found = Facts(mb_s, latency, token, wait, read, told["direct"] is True)
        right = (told["version"], told["model_id"]) == (VERSION, bundle.model_id)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    fits = all(isfinite(x) and 0 <= x < _MOST for x in numbers) and found.flash_mb_s > 0 and found.token_ms > 0
    return found if right and fits else None


def write_routing(bundle: Bundle, routing: Routing, text: str) -> None:
    """Keeps routing; a folder that cannot be written is no error.

    Args:
        routing: of all layers.
        text: what it was recorded along, for people.
    """
    experts, path = bundle.config.experts, routing_file(bundle)
    if experts is not None and path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            RoutingFile(routing, bundle.model_id, experts.n_experts, text).save(path)


def read_routing(bundle: Bundle) -> tuple[Routing, str] | None:
    """Routing that was kept, of all layers, and what it was recorded along; None where there is none that fits."""
    experts, path = bundle.config.experts, routing_file(bundle)
    if experts is None or path is None:
        return None
    try:
        found = RoutingFile.load(path)
    except EngineError:
        return None
    fits = (found.model, found.n_experts) == (bundle.model_id, experts.n_experts)
    shape = bundle.config.n_layers, experts.top_k
    return (found.routing, found.text) if fits and found.routing.chosen.shape[1:] == shape else None


def of_expert_layers(routing: Routing, config: DecoderConfig) -> Routing:
    """Without the layers that have no experts."""
    layers = [layer for layer in range(config.n_layers) if config.experts_of(layer)]
    if len(layers) == config.n_layers:
        return routing
    return Routing(routing.chosen[:, layers], routing.weights[:, layers], routing.foreseen[:, layers])


def _read(path: Path | None) -> bytes:
    with suppress(OSError):
        if path is not None and path.stat().st_size <= MOST_BYTES:
            return read_regular(path)
    return b""


def _write(path: Path | None, data: bytes) -> None:
    with suppress(OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
