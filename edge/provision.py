"""A device fetches its part of a bundle, or more of it, from a cloud: resumable, and each file checked by its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.edge.link import Link, Restart
from isthmus.edge.offers import choose
from isthmus.edge.options import layers_wanted
from isthmus.edge.token import Mode
from isthmus.protocol import messages as m
from isthmus.protocol.errors import BundleError, DeviceError, LinkError
from isthmus.split.bundle import Bundle
from isthmus.split.files import PARTIAL, is_there, locked, open_regular
from isthmus.split.manifest import EMBEDDING, HEAD, Manifest

MAX_TRIES = 3
Progress = Callable[[str, int, int], None]


def provision(
    path: Path,
    link: Callable[[str], Link],
    mode: Mode,
    cut: int | None,
    progress: Progress | None = None,
    *,
    model: str = "",
) -> Bundle:
    """Opens a bundle's folder, having fetched what a device lacks to begin.

    Args:
        link: gives a link to the cloud for the model of that id, "" for the cloud's only one.
        mode, cut: as in `options.layers_wanted`.
        progress: as in `fetch_part`.
        model: which of the cloud's models to fetch, as in `offers.choose`.

    Raises:
        BundleError, DeviceError, LinkError: as `fetch_part` and `fetch_more`.
    """
    if not is_there(path / "bundle.json"):
        first = link("")
        welcome = first.welcome()
        assert welcome is not None
        offer = choose(welcome.offers, model)
        layers_wanted(offer, mode, cut)  # refuses a cut that the model has not, before anything is fetched
        _fetch_all(first, path, offer.model_id, lambda manifest: wanted(manifest, mode, cut), progress)
        return Bundle.open(path)
    bundle = Bundle.open(path)
    layers = wanted(bundle.manifest, mode, cut, bundle.held_layers)
    try:
        fetch_more(link(bundle.model_id), bundle, layers, progress)
    except LinkError:
        if mode != "auto":  # which begins without a cloud, too
            raise
    return bundle


def wanted(manifest: Manifest, mode: Mode, cut: int | None, held: int | None = None) -> int:
    """As `options.layers_wanted`; in exit mode those before the exit that is to speak, by default the deepest.

    Args:
        held: a device that holds layers enough for some exit needs no deeper one.
    """
    layers = layers_wanted(manifest.config, mode, cut, held)
    if mode != "exit" or cut is not None or not manifest.exits:
        return layers
    before = [entry.layer for entry in manifest.exits]
    return max([layer for layer in before if layer <= (held or 0)] or before)


def fetch_part(
    link: Link, path: Path, *, layers: int | None = None, model_id: str = "", progress: Progress | None = None
) -> Manifest:
    """Fetches what a device needs to run layers [0, layers), and the exits before them, into the folder `path`.

    Files that are there already and have the right hash stay; a file that was cut off goes on where it ended.
    `bundle.json` is written last, so that a folder that has one is complete.

    Args:
        layers: layers to hold; None for the whole model, 0 for the tokenizer alone.
        model_id: which bundle; empty for the cloud's only one.
        progress: called with a file's name, the bytes that are here, and its size.

    Raises:
        LinkError: the cloud is gone; calling again goes on where this ended.
        BundleError: what the cloud sends does not fit its hashes.
        DeviceError: the folder cannot be written, or another process writes it.
    """
    return _fetch_all(link, path, model_id, lambda _: layers, progress)


def _fetch_all(
    link: Link, path: Path, model_id: str, layers: Callable[[Manifest], int | None], progress: Progress | None
) -> Manifest:
    """See `fetch_part`; so many layers as the manifest says."""
    link.welcome()
    answer = _ask(link, m.GetManifest(model_id))
    assert isinstance(answer, m.Manifest)
    manifest = Manifest.parse(answer.data)
    if model_id and manifest.model_id != model_id:
        raise BundleError(f"the cloud sent the bundle {manifest.model_id} for {model_id}", "ask another cloud")
    with _writing(path):
        part = _partial(path / "bundle.json")
        part.write_bytes(answer.data)
        for name in part_files(manifest, layers(manifest)):
            _fetch(link, manifest, path, name, progress)
        part.replace(path / "bundle.json")
    return manifest


def fetch_more(link: Link, bundle: Bundle, layers: int, progress: Progress | None = None) -> None:
    """Fetches what a bundle's folder lacks to run layers [0, layers); each file appears there when it is whole.

    Args:
        layers, progress: as in `fetch_part`.

    Raises:
        LinkError: the cloud is gone; calling again goes on where this ended.
        BundleError: what the cloud sends does not fit the bundle's hashes.
        DeviceError: the cloud does not serve this model, or the folder cannot be written or holds another one by now.
    """
    lacking = [name for name in part_files(bundle.manifest, layers) if not bundle.holds(name)]
    if lacking:
        link.welcome()
        with _writing(bundle.path):
            if Bundle.open(bundle.path).model_id != bundle.model_id:
                raise DeviceError(f"the bundle in {bundle.path} was replaced meanwhile", "try again")
            for name in lacking:
                _fetch(link, bundle.manifest, bundle.path, name, progress)


def part_files(manifest: Manifest, layers: int | None) -> list[str]:
    """The files of a device's part: tokenizer, embedding, its layers and the exits before them, and the output head
    where it holds all layers or an exit needs that.

    Raises:
        BundleError: the model has fewer layers.
    """
    n_layers = manifest.config.n_layers
    held = n_layers if layers is None else layers
    if not 0 <= held <= n_layers:
        raise BundleError(f"{held} layers are wanted of {n_layers}", f"choose 0..{n_layers}")
    weights = list(manifest.part_files(0, held)) if held else []
    exits = manifest.exit_files(entry.layer for entry in manifest.exits if entry.layer <= held)
    if exits and not manifest.config.tied and HEAD not in weights:
        weights.append(HEAD)
    return [manifest.tokenizer.file, *sorted(weights, key=lambda name: (name != EMBEDDING, name)), *exits]


def _fetch(link: Link, manifest: Manifest, path: Path, name: str, progress: Progress | None) -> None:
    entry, target = manifest.files[name], path / name
    if _hash(target) == entry.sha256:
        return
    partial = _partial(target)
    for _ in range(MAX_TRIES):
        digest = hashlib.sha256()
        with partial.open("ab+") as file:
            _resume(file.fileno(), digest, entry.bytes)
            at = os.fstat(file.fileno()).st_size
            while at < entry.bytes:
                length = min(m.MAX_RANGE_BYTES, entry.bytes - at)
                answer = _ask(link, m.GetRange(manifest.model_id, name, entry.sha256, at, length))
                assert isinstance(answer, m.Range)
                if answer.total_bytes != entry.bytes or not 0 < len(answer.data) <= length:
                    raise BundleError(
                        f"the cloud's {name} has {answer.total_bytes} bytes instead of {entry.bytes}",
                        "its bundle was altered",
                    )
                file.write(answer.data)
                digest.update(answer.data)
                at += len(answer.data)
                if progress:
                    progress(name, at, entry.bytes)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() == entry.sha256:
            partial.replace(target)
            return
        partial.unlink()
    raise BundleError(f"{name} from the cloud has another sha256 than listed", "the cloud's bundle was altered")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Keeps a folder for this process and says what hinders writing there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path.resolve()):  # the folder may be a link
            yield
    except BlockingIOError as error:
        raise DeviceError(f"another process is fetching into {path}", "wait until it is done") from error
    except OSError as error:
        remedy = "make room or choose another folder; fetching again goes on where this ended"
        raise DeviceError(f"cannot write the bundle to {path}: {error.strerror}", remedy) from error


def _partial(target: Path) -> Path:
    """Where a file is gathered; what is no regular file there is removed."""
    partial = target.with_name(target.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_symlink() or (partial.exists() and not partial.is_file()):
        partial.unlink()
    return partial


def _resume(descriptor: int, digest: hashlib._Hash, size: int) -> None:
    """Takes what an earlier call left of a file into the digest; too much of it is cut off."""
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    while data := os.read(descriptor, 1 << 20):
        digest.update(data)


def _ask(link: Link, request: m.GetManifest | m.GetRange) -> m.Manifest | m.Range:
    for _ in range(8):
        try:
            return link.serve(request)
        except Restart:
            continue
    raise LinkError("the link does not hold", "try again")


def _hash(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
