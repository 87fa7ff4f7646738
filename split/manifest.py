"""`bundle.json`: what a bundle is and the size and hash of each of its files; read strictly, nothing is trusted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import BundleError, EngineError, IsthmusError
from isthmus.split.exit_entry import ExitEntry, check_exits
from isthmus.split.tolerance import Tolerance

FORMAT_VERSION = 1
KIND, GRAPH_KIND = "decoder", "graph"
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen2_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
)
MAX_NAME_CHARS = 200
MAX_EOS = 256  # as many as a request to a cloud may name
MAX_FILE_BYTES = 1 << 50
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")

EMBEDDING, NORM, HEAD = "weights/embed.safetensors", "weights/norm.safetensors", "weights/head.safetensors"


def layer_file(index: int) -> str:
    """The name of a layer's weight file."""
    return f"weights/layer-{index:03d}.safetensors"


def expert_file(index: int) -> str:
    """The name of the file of a layer's experts."""
    return f"weights/experts-{index:03d}.safetensors"


def check_name(name: str) -> str:
    """A file's name within a bundle: relative, with forward slashes, never leading out of it.

    Raises:
        BundleError: any other name.
    """
    parts = name.split("/")
    if not 1 <= len(parts) <= 4 or not all(_PART.match(part) for part in parts):
        raise BundleError(f"bundle.json names the file {name!r}", "a bundle's files must lie inside its folder")
    return name


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """Size and hash of a file.

    Attributes:
        header: the sha256 of a file's header alone, where that is read without the rest.
    """

    bytes: int
    sha256: str
    header: str = ""


def check_files(files: Mapping[str, FileEntry]) -> None:
    """What a bundle.json says of its files.

    Raises:
        BundleError: a name that leads out of the bundle, or a size or a hash that is none.
    """
    for name, entry in files.items():
        check_name(name)
        hashes = [entry.sha256, *([entry.header] if entry.header else [])]
        if not 0 <= entry.bytes <= MAX_FILE_BYTES or not all(map(_HEX.match, hashes)):
            raise BundleError(f"bundle.json has no valid size and hash of {name}", "fetch or split the model again")


class TokenizerEntry(msgspec.Struct, frozen=True):
    """The tokenizer's file and what the file itself cannot say.

    Attributes:
        eos: ids that end an answer.
        add_bos: whether `bos` stands before every text.
    """

    file: str = "tokenizer.json"
    chat_template: str | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    add_bos: bool = False


def check_tokenizer(entry: TokenizerEntry, vocab_size: int, error: type[IsthmusError] = BundleError) -> None:
    """Checks the tokens that an entry names.

    Raises:
        IsthmusError: of class `error`, if one is not in the vocabulary, or there are too many.
    """
    named = {"bos": () if entry.bos is None else (entry.bos,), "eos": entry.eos}
    for what, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                problem = f"the tokenizer's {what} is token {token} and the vocabulary has {vocab_size}"
                raise error(problem, "fetch or split the model again")
    if len(entry.eos) > MAX_EOS:
        raise error(f"the tokenizer has {len(entry.eos)} end tokens", f"at most {MAX_EOS} are supported")


def check_model_name(name: str) -> None:
    """A model's name, which is shown to people: one line of visible characters.

    Raises:
        BundleError: another name.
    """
    if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
        problem = f"the model's name is {name[:MAX_NAME_CHARS]!r}"
        raise BundleError(problem, f"choose another with --name: 1..{MAX_NAME_CHARS} printable characters")


class _Wire(msgspec.Struct, frozen=True):
    format_version: int
    kind: str
    name: str
    model_id: str
    config: dict[str, Any]
    weights: str
    tokenizer: TokenizerEntry
    files: dict[str, FileEntry]
    exits: tuple[ExitEntry, ...] = ()
    tolerance: Tolerance | None = None


class _Version(msgspec.Struct, frozen=True):
    format_version: int


class Manifest(msgspec.Struct, frozen=True):
    """What `bundle.json` says.

    Attributes:
        name: for people; the identity is `model_id`.
        model_id: BLAKE2b-128 over the configuration and the hashes of all weight files, in hex.
        weights: the format asked for when the bundle was written ("keep", "q4", ...).
        files: every file but bundle.json, by its name within the bundle.
        exits: trained on the model and no part of its identity, in ascending order of their layers.
        tolerance: with how few bits experts may be read; None until that is calibrated.
    """

    name: str
    model_id: str
    config: DecoderConfig
    weights: str
    tokenizer: TokenizerEntry
    files: dict[str, FileEntry]
    exits: tuple[ExitEntry, ...] = ()
    tolerance: Tolerance | None = None

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """From the bytes of a `bundle.json`.

        Raises:
            BundleError: another version, kind or family, a field or layer that is missing, a name that leads out
                of the bundle, a token beyond the vocabulary, or a model_id that does not follow from the files.
        """
        again = "fetch or split the model again"
        try:
            version = msgspec.json.decode(data, type=_Version).format_version
            if version != FORMAT_VERSION:
                remedy = "split the model again" if version < FORMAT_VERSION else "install a newer isthmus"
                raise BundleError(f"bundle.json has format_version {version}, not {FORMAT_VERSION}", remedy)
            wire = msgspec.json.decode(data, type=_Wire)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BundleError(f"bundle.json cannot be read: {error}", again) from error
        if wire.kind == GRAPH_KIND:
            raise BundleError("the bundle is of a network that was cut", "open it with isthmus.edge.GraphDevice")
        if wire.kind != KIND:
            raise BundleError(f"the bundle's kind is {wire.kind!r}", f"this version runs {KIND!r}")
        family = wire.config.get("family")
        if family not in FAMILIES:
            raise BundleError(f"the bundle's family {family!r} is unknown", f"supported are {', '.join(FAMILIES)}")
        try:
            config = DecoderConfig.from_dict(wire.config)
            msgspec.convert(wire.config, DecoderConfig)  # its types
        except EngineError as error:
            raise BundleError(f"bundle.json: {error.problem}", again) from error
        except (msgspec.MsgspecError, ArithmeticError) as error:
            raise BundleError(f"bundle.json: the configuration does not fit: {error}", again) from error
        if not all(0 <= window < 2**31 for window in config.windows):
            raise BundleError(f"bundle.json has the attention windows {config.windows[:4]}", again)
        check_model_name(wire.name)
        if len(wire.weights) > MAX_NAME_CHARS or not wire.weights.isprintable():
            raise BundleError(f"bundle.json names the weight format {wire.weights[:MAX_NAME_CHARS]!r}", again)
        check_tokenizer(wire.tokenizer, config.vocab_size)
        check_files(wire.files)
        if config.n_layers > len(wire.files):
            raise BundleError(f"bundle.json lists {len(wire.files)} files for {config.n_layers} layers", again)
        manifest = cls(
            wire.name, wire.model_id, config, wire.weights, wire.tokenizer, wire.files, wire.exits, wire.tolerance
        )
        for name in [*manifest.part_files(0, config.n_layers), wire.tokenizer.file]:
            if name not in wire.files:
                raise BundleError(f"bundle.json lists no {name}", again)
        if wire.model_id != model_id(config, wire.files):
            raise BundleError(f"model_id {wire.model_id!r} does not follow from the bundle's files", again)
        if wire.tolerance is not None:
            wire.tolerance.check(config, wire.model_id)
        check_exits(wire.exits, config.n_layers, {name: entry.sha256 for name, entry in wire.files.items()})
        return manifest

    def encode(self) -> bytes:
        """The bytes of a `bundle.json`."""
        fields: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "name": self.name,
            "model_id": self.model_id,
            "config": self.config.to_dict(),
            "weights": self.weights,
            "tokenizer": msgspec.to_builtins(self.tokenizer),
            "files": {name: msgspec.to_builtins(self.files[name]) for name in sorted(self.files)},
        }
        if self.exits:
            fields["exits"] = msgspec.to_builtins(self.exits)
        if self.tolerance is not None:
            fields["tolerance"] = msgspec.to_builtins(self.tolerance)
        return json.dumps(fields, indent=1).encode() + b"\n"

    def layer_files(self, index: int) -> Sequence[str]:
        """The weight files of one layer."""
        return [layer_file(index), expert_file(index)] if self.config.experts_of(index) else [layer_file(index)]

    def part_files(self, start: int, end: int) -> Sequence[str]:
        """The weight files that layers [start, end) need, with the embedding at 0 and norm and head at n_layers."""
        names = [name for index in range(start, end) for name in self.layer_files(index)]
        if start == 0 or (self.config.tied and end == self.config.n_layers):
            names.insert(0, EMBEDDING)
        if end == self.config.n_layers:
            names += [NORM] if self.config.tied else [NORM, HEAD]
        return names

    def exit_files(self, layers: Iterable[int] | None = None) -> Sequence[str]:
        """The weight files of the exits before some layers, by default of all; they need the output head, too.

        Raises:
            BundleError: there is no exit before one of the layers.
        """
        return [entry.file for entry in (self.exits if layers is None else map(self.exit, layers))]

    def exit(self, layer: int) -> ExitEntry:
        """What is said of the exit before a layer.

        Raises:
            BundleError: there is none.
        """
        for entry in self.exits:
            if entry.layer == layer:
                return entry
        layers = ", ".join(str(entry.layer) for entry in self.exits)
        remedy = f"choose one of {layers}" if layers else "train some: isthmus exits train"
        raise BundleError(f"{self.name} has no exit before layer {layer}", remedy)

    def exit_bytes(self, layer: int) -> int:
        """Bytes of weights that one decision of an exit reads: the layers before it, its own, its output head's rows.

        Raises:
            BundleError: there is no exit before the layer.
        """
        entry = self.exit(layer)
        head = self.files[EMBEDDING if self.config.tied else HEAD].bytes
        if entry.head_tokens:
            head = head * entry.head_tokens // self.config.vocab_size
        return (
            sum(self.files[name].bytes for i in range(layer) for name in self.layer_files(i))
            + self.files[entry.file].bytes
            + head
        )


def model_id(config: DecoderConfig, files: Mapping[str, FileEntry]) -> str:
    """BLAKE2b-128 over the configuration and the hashes of the weight files, in hex; no path or label enters."""
    weights = {name: entry.sha256 for name, entry in sorted(files.items()) if name.startswith("weights/")}
    canonical = json.dumps([config.to_dict(), weights], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
