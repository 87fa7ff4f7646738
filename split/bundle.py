"""A bundle opened to be run: the engine's weights, mapped from files that are checked when they are first loaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import BundleError
from isthmus.quant.packed import PackedMatrix
from isthmus.split.exit_entry import ExitEntry
from isthmus.split.exits import ExitSource
from isthmus.split.expert_file import Records
from isthmus.split.files import open_regular, read_regular, regular_size
from isthmus.split.manifest import EMBEDDING, HEAD, NORM, FileEntry, Manifest, check_name, expert_file, layer_file
from isthmus.split.roles import Weights, check_layer
from isthmus.split.tensorfile import TensorFile

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer

MANIFEST_FILE = "bundle.json"
MAX_MANIFEST_BYTES = 16 << 20
AGAIN = "remove it, and fetch or split the model again"
AHEAD_BYTES = 48 << 20  # hashed in the background beyond the file that was asked for
WORKERS = 2


class Bundle:
    """A bundle's folder; a `WeightSource`. It may be partial: hold only some of the files that it lists.

    A weight file is mapped and its sha256 computed over the mapped bytes when it is first asked for, while two
    threads hash those that usually come next. Nothing is handed out before its own hash was compared; no result
    is remembered on disk, since whoever alters a file could alter that too.

    Args:
        experts: whether layers come with their experts; without, somebody else reads those.

    Attributes:
        path: the folder.
        manifest: what bundle.json says.
    """

    def __init__(self, path: Path, manifest: Manifest, *, experts: bool = True) -> None:
        self.path = path
        self._experts = experts
        self.manifest = manifest
        self._root = path.resolve()
        self._files: dict[str, Future[TensorFile]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads bundle.json and compares the sizes of the files that are there; no weight is read.

        Raises:
            BundleError: no bundle, another version, kind or family, a damaged bundle.json or a truncated file.
        """
        folder = Path(path)
        bundle = cls(folder, Manifest.parse(read_manifest(folder)))
        for name in bundle.manifest.files:
            bundle.holds(name)
        return bundle

    def without_experts(self) -> Bundle:
        """The same bundle, whose layers come without their experts."""
        return Bundle(self.path, self.manifest, experts=False)

    def records(self, index: int) -> Records:
        """Where the experts of a layer stand in their file, whose header alone is read.

        Raises:
            BundleError: the layer has none, or its file is absent, was altered, or is another layer's.
        """
        name = expert_file(index)
        return Records.open(self._held(name), self.config, self._entry(name).header)

    @property
    def config(self) -> DecoderConfig:
        """Shapes and flags of the model."""
        return self.manifest.config

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return self.manifest.name

    @property
    def model_id(self) -> str:
        """The model's identity: configuration and weights, in hex."""
        return self.manifest.model_id

    def embedding(self) -> PackedMatrix:
        """The token embedding [vocab_size, d_model]."""
        return self._matrix(EMBEDDING, "embedding")

    def layer(self, index: int) -> Weights:
        """The weights of a layer (see `WeightSource`).

        Raises:
            BundleError: no such layer, or its file is absent or was altered.
        """
        if not 0 <= index < self.config.n_layers:
            raise BundleError(f"the model has no layer {index}", f"its layers are 0..{self.config.n_layers - 1}")
        weights = self._load(layer_file(index)).weights()
        if self.config.experts_of(index) and self._experts:
            file = self._load(expert_file(index))
            weights |= {name: file.matrix(name) for name in file.matrices}
        check_layer(self.config, index, weights, BundleError, experts=self._experts)
        return weights

    def final_norm(self) -> NDArray[np.float32]:
        """The last norm's weight [d_model]."""
        norm = self._load(NORM).weights().get("final_norm")
        if not isinstance(norm, np.ndarray) or norm.shape != (self.config.d_model,):
            raise BundleError(f"{NORM} holds no final_norm [{self.config.d_model}]", "split the model again")
        return norm

    def head(self) -> PackedMatrix:
        """The output head [vocab_size, d_model]; the embedding when they are tied."""
        return self.embedding() if self.config.tied else self._matrix(HEAD, "head")

    @property
    def exits(self) -> tuple[ExitEntry, ...]:
        """What bundle.json says of the exits, in ascending order of their layers."""
        return self.manifest.exits

    def exit(self, layer: int) -> ExitSource:
        """The exit before a layer.

        Raises:
            BundleError: there is none, its file is absent or was altered, or it was trained for another model.
        """
        entry = self.manifest.exit(layer)
        source = ExitSource.from_file(self, self.model_id, layer, self._start(entry.file).result())
        tokens = source.head_tokens()
        found = source.config.d_ff, 0 if tokens is None else len(tokens)
        if found != (entry.d_ff, entry.head_tokens):
            problem = f"{entry.file} has d_ff {found[0]} and {found[1]} head tokens, which is not what bundle.json says"
            raise BundleError(problem, "train it again")
        return source

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, its file checked.

        Raises:
            BundleError: the file is absent or was altered.
            ModelError: it cannot be read.
        """
        if self._tokenizer is None:
            from isthmus.split.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_entry(self.read(self.manifest.tokenizer.file), self.manifest.tokenizer)
        return self._tokenizer

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked.

        Raises:
            BundleError: it is not listed, absent, or was altered.
        """
        target, entry = self._held(name), self._entry(name)
        try:
            data = read_regular(target)
        except OSError as error:
            raise _unreadable(target, error) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            problem = f"{target} was altered: its sha256 is not the listed one"
            raise BundleError(problem, AGAIN)
        return data

    def holds(self, name: str) -> bool:
        """Whether a listed file is in the folder.

        Raises:
            BundleError: what stands there has another size, is no regular file, or lies elsewhere.
        """
        target, entry = self._path(name), self._entry(name)
        try:
            size = regular_size(target)
        except OSError as error:
            raise _unreadable(target, error) from error
        if size not in (None, entry.bytes):
            raise BundleError(f"{target} has {size} bytes instead of {entry.bytes}", AGAIN)
        return size is not None

    @property
    def held_layers(self) -> int:
        """The n for which layers [0, n) and the embedding are here."""
        if not self.holds(EMBEDDING):
            return 0
        index = 0
        while index < self.config.n_layers and all(map(self.holds, self.manifest.layer_files(index))):
            index += 1
        return index

    @property
    def whole(self) -> bool:
        """Whether every listed file is here."""
        return all(self.holds(name) for name in self.manifest.files)

    def prefetch(self, start: int = 0, end: int | None = None) -> Callable[[], bool]:
        """Starts mapping and hashing in the background what layers [start, end) need; loading waits for it.

        Returns:
            A cheap look at whether that is done.
        """
        last = self.config.n_layers if end is None else end
        under_way = [self._start(name) for name in self._loaded(start, last) if self.holds(name)]
        return lambda: all(one.done() for one in under_way)

    def verify(self, names: Iterable[str] | None = None, progress: Callable[[str, int], None] | None = None) -> None:
        """Compares the hash of every file that is here, or of those named.

        Args:
            progress: called with a file's name and bytes when it was found whole.

        Raises:
            BundleError: the first file that is absent (if named) or was altered.
        """
        for name in [n for n in self.manifest.files if self.holds(n)] if names is None else names:
            if name.startswith("weights/"):
                self._start(name).result()
            else:
                self.read(name)
            if progress:
                progress(name, self.manifest.files[name].bytes)

    def _matrix(self, file: str, name: str) -> PackedMatrix:
        matrix = self._load(file).matrix(name)
        if (matrix.rows, matrix.cols) != (self.config.vocab_size, self.config.d_model):
            shape = (self.config.vocab_size, self.config.d_model)
            raise BundleError(f"{file} is [{matrix.rows}, {matrix.cols}], not {list(shape)}", "split the model again")
        return matrix

    def _load(self, name: str) -> TensorFile:
        future = self._start(name)
        ahead = 0
        order = self._loaded(0, self.config.n_layers)
        for following in order[order.index(name) + 1 :]:
            ahead += self.manifest.files[following].bytes
            if ahead > AHEAD_BYTES:
                break
            if self.holds(following):
                self._start(following)
        return future.result()

    def _loaded(self, start: int, end: int) -> list[str]:
        """The files that layers [start, end) are loaded from, in order."""
        left_out = set() if self._experts else {expert_file(index) for index in range(start, end)}
        return [name for name in self.manifest.part_files(start, end) if name not in left_out]

    def _start(self, name: str) -> Future[TensorFile]:
        with self._lock:
            if name not in self._files:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="bundle")
                self._files[name] = self._pool.submit(self._checked, name)
            return self._files[name]

    def _checked(self, name: str) -> TensorFile:
        return TensorFile(self._held(name), sha256=self._entry(name).sha256)

    def _held(self, name: str) -> Path:
        if not self.holds(name):
            remedy = "fetch it from the cloud or split the model again"
            raise BundleError(f"{self.path} does not hold {name}", remedy)
        return self._path(name)

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"bundle.json lists no {name}", "split the model again")
        return self.manifest.files[name]

    def _path(self, name: str) -> Path:
        target = self._root / check_name(name)
        try:
            inside = target.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError) as error:  # a loop of links
            raise BundleError(f"{name} in {self.path} leads nowhere", AGAIN) from error
        if not inside:
            raise BundleError(f"{name} leads out of {self.path}", "a bundle's files must lie inside its folder")
        return target


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path} cannot be read ({error.strerror})", AGAIN)


def read_manifest(folder: Path) -> bytes:
    """The bytes of a bundle's bundle.json.

    Raises:
        BundleError: there is none, or it is too large to be one.
    """
    try:
        with open_regular(folder / MANIFEST_FILE) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        if folder.is_file():
            raise BundleError(
                f"{folder} is a file, and no bundle's folder", f"cut it: isthmus split {folder} -o DIR"
            ) from error
        remedy = f"write one with: isthmus split MODEL -o {folder}"
        raise BundleError(f"{folder} holds no bundle ({error.strerror})", remedy) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{folder / MANIFEST_FILE} has more than {MAX_MANIFEST_BYTES} bytes", "it is no bundle.json")
    return data


def is_graph(path: str | Path) -> bool:
    """Whether a folder holds a network that was cut, and no language model; both are opened by their own class.

    Raises:
        BundleError: it holds no bundle.
    """
    try:
        told = json.loads(read_manifest(Path(path)))
    except (ValueError, RecursionError):
        return False  # who opens it says what is wrong with it
    return isinstance(told, dict) and told.get("kind") == "graph"
