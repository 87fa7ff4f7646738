"""Checkpoints, a GGUF file or a Hugging Face folder, as a source of packed weights, converted when asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import ModelError, QuantError
from isthmus.quant.groups import QUANTIZABLE, chunks, decode_rows, empty, encode_rows, write_rows
from isthmus.quant.packed import PackedMatrix
from isthmus.split import gguf_config, hf_config, mxfp4
from isthmus.split.files import is_there, read_regular
from isthmus.split.ggml_blocks import LOSSLESS
from isthmus.split.gguf_file import GgufFile, GgufTensor
from isthmus.split.manifest import check_tokenizer
from isthmus.split.places import Place, half_rotated_rows, latent_rows, turned
from isthmus.split.roles import Weights, array_shapes, check_layer, matrix_shapes
from isthmus.split.tensorfile import TensorFile

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer

KEEP = "keep"
REMEDY = "name a --format, such as q8"
FLOATS = ("f32", "f16", "bf16")
# What `isthmus split --format` takes -> (format of a layer's matrices, format of embedding and head)
TARGETS: Mapping[str, tuple[str, str]] = {
    KEEP: (KEEP, KEEP),
    "f32": ("f32", "f32"),
    "f16": ("f16", "f16"),
    "q8": ("q8", "q8"),
    "q4": ("q4", "q8"),
    "q4m": ("q4m", "q8"),
    "nested": ("n8", "q8"),
}
_HF_FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_QUANTIZATION = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)\Z", re.IGNORECASE)  # at the end of a GGUF file's name
_APART = ("attn_k_b.weight", "attn_v_b.weight")  # of GGUF: maps to keys, transposed already, and to values
_MXFP4 = (mxfp4.BLOCKS, mxfp4.SCALES)
_IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")


class _Store(Protocol):
    """Tensors by name; a GGUF file or safetensors files."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, index: NDArray[np.int64] | slice) -> tuple[str, Mapping[str, NDArray[np.generic]]]:
        """Format and row-major arrays of some rows; leading dimensions count as rows."""
        ...


class Checkpoint:
    """A model read from a checkpoint; a `WeightSource`.

    Args:
        format: "keep" for the file's own precision without loss, or another key of `TARGETS`. Where a layer's
            matrices get 4 bits or nested planes, embedding and head get 8: they decide on the token, and 4 bits
            there cost more quality than they save.
        head_format: another format for embedding and head, out of `TARGETS` or `quant.groups.QUANTIZABLE`.

    Attributes:
        name: for people.
        config: shapes and flags.
    """

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        store: _Store,
        names: Mapping[str, Place],
        tokenizer: Any,
        *,
        permuted: bool,
        format: str = KEEP,
        head_format: str | None = None,
    ) -> None:
        if format not in TARGETS:
            raise ModelError(f"weight format {format!r} is unknown", f"choose one of {', '.join(TARGETS)}")
        self.name, self._config, self.format = name, config, format
        self._layer_format, self._head_format = TARGETS[format]
        if head_format is not None:
            self._head_format = TARGETS[head_format][0] if head_format in TARGETS else head_format
        if self._head_format != KEEP and self._head_format not in QUANTIZABLE:
            raise ModelError(f"weight format {head_format!r} is unknown", f"choose one of {', '.join(TARGETS)}")
        self._store, self._names, self._tokenizer, self._permuted = store, names, tokenizer, permuted
        used = {place.tensor for place in names.values()}
        present = store.names()
        for tensor in sorted(used - present):
            raise ModelError(f"the checkpoint has no tensor {tensor}", "fetch the model again, all its files")
        for tensor in sorted(present - used):
            if not tensor.endswith(_IGNORED) and not (config.tied and tensor == hf_config.HF_TOP["head"]):
                raise ModelError(f"tensor {tensor} is not known in family {config.family}", "it is not supported yet")

    @property
    def config(self) -> DecoderConfig:
        """Shapes and flags of the model."""
        return self._config

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ModelError: there is none, it is of a kind that is not supported, or it names tokens that are none.
        """
        found: Tokenizer = self._tokenizer()
        check_tokenizer(found.entry, self.config.vocab_size, ModelError)
        return found

    def embedding(self) -> PackedMatrix:
        """The token embedding [vocab_size, d_model]."""
        return self._matrix("embedding", (self.config.vocab_size, self.config.d_model), self._head_format)

    def head(self) -> PackedMatrix:
        """The output head [vocab_size, d_model]; the embedding when they are tied."""
        if self.config.tied:
            return self.embedding()
        return self._matrix("head", (self.config.vocab_size, self.config.d_model), self._head_format)

    def final_norm(self) -> NDArray[np.float32]:
        """The last norm's weight [d_model]."""
        return self._array("final_norm", (self.config.d_model,))

    def layer(self, index: int) -> Weights:
        """The weights of a layer (see `WeightSource`), converted now.

        Raises:
            ModelError: a tensor has another shape than the configuration says, or a type that cannot be kept.
        """
        found: dict[str, PackedMatrix | NDArray[np.float32]] = {}
        for role, shape in array_shapes(self.config, index).items():
            found[role] = self._array(f"{index}.{role}", shape)
        for role, size in matrix_shapes(self.config, index).items():
            found[role] = self._matrix(f"{index}.{role}", size, self._layer_format)
        check_layer(self.config, index, found, ModelError)
        return found

    def _order(self, key: str, size: tuple[int, int]) -> NDArray[np.int64] | None:
        """For each row of a matrix its row in the tensor, None for the same order."""
        role = key.rpartition(".")[2]
        if self.config.latent and not self._names[key].tensor.endswith(_APART):
            return latent_rows(self.config, self.config.latent, role)
        return half_rotated_rows(size[0], self.config.head_dim) if self._permuted and role in ("q", "k") else None

    def _place(self, key: str, shape: tuple[int, ...]) -> tuple[Place, int]:
        """Where a weight is, and the first row of its tensor or of the expert's entry of it."""
        place, first = self._names[key], 0
        found = self._store.shape(place.tensor)
        if place.tensor.endswith(_APART) and len(found) == 3:  # a matrix for each head
            found = (found[0] * found[1], found[2])
        if place.entry is not None:
            found = found[1:] if len(found) == 3 and place.entry < found[0] else (0,)
            first = place.entry * found[0]
        if place.parts > 1 and key.rpartition("_")[2] == "bias":
            shape = (*shape[:-1], shape[-1] * place.parts)
        elif place.parts > 1:
            shape = (shape[0] * place.parts, *shape[1:])
        expected = shape[::-1] if place.transposed else shape
        if found != expected and (1, *found) != expected:  # GGUF has no matrices of one row
            problem = f"tensor {place.tensor} is {list(found)}, not {list(expected)}"
            raise ModelError(problem, "the checkpoint is damaged")
        return place, first

    def _array(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        place, _ = self._place(key, shape)
        format, values = self._store.rows(place.tensor, slice(None))
        found = decode_rows(format, values, shape[-1] * place.parts)
        return (found if place.parts == 1 else found[:, place.rows(shape[-1])]).reshape(shape)

    def _matrix(self, key: str, size: tuple[int, int], format: str) -> PackedMatrix:
        (rows, cols), order = size, self._order(key, size)
        role = key.rpartition(".")[2]
        latent = self.config.latent
        joined = latent and role in ("k_up", "v_up") and not self._names[key].tensor.endswith(_APART)
        if latent and joined:  # both stand in one tensor
            place = self._names[key]
            self._check(place.tensor, (self.config.n_heads * (latent.d_plain + latent.d_value), latent.kv_rank))
            first = 0
        else:
            place, first = self._place(key, size)
        if (joined and role == "k_up") or place.transposed:
            return self._transposed(place, first, size, format, order)
        if order is None and place.interleaved:
            order = place.rows(rows)
        first += 0 if place.interleaved else place.part * rows
        matrix: PackedMatrix | None = None
        try:
            for start, end in chunks(rows, cols):
                index = slice(first + start, first + end) if order is None else first + order[start:end]
                kept, values = self._store.rows(place.tensor, index)
                if format == KEEP and kept == "dequantized":
                    raise ModelError(f"tensor {place.tensor} has a type that cannot be kept", REMEDY)
                if format not in (KEEP, kept):
                    values = encode_rows(decode_rows(kept.replace("dequantized", "f32"), values, cols), format)
                if matrix is None:
                    matrix = empty(kept if format == KEEP else format, rows, cols)
                write_rows(matrix, start, values)
        except QuantError as error:
            raise ModelError(f"tensor {place.tensor}: {error.problem}", error.remedy) from error
        assert matrix is not None  # a configuration has no empty matrix
        return matrix

    def _check(self, tensor: str, expected: tuple[int, ...]) -> None:
        found = self._store.shape(tensor)
        if found != expected:
            problem = f"tensor {tensor} is {list(found)}, not {list(expected)}"
            raise ModelError(problem, "the checkpoint is damaged")

    def _transposed(
        self, place: Place, first: int, size: tuple[int, int], format: str, order: NDArray[np.int64] | None
    ) -> PackedMatrix:
        """A matrix whose rows are columns of the tensor, or of blocks of its rows: read whole, and only floats."""
        rows, cols = size
        kept, values = self._store.rows(place.tensor, slice(first, first + cols) if order is None else order)
        if format == KEEP and kept not in FLOATS:
            raise ModelError(f"tensor {place.tensor} has a type that cannot be kept when it is transposed", REMEDY)
        if kept not in FLOATS:
            width = self._store.shape(place.tensor)[-1]
            kept, values = "f32", {"w": decode_rows(kept.replace("dequantized", "f32"), values, width)}
        whole = turned(values["w"], cols)
        target = kept if format == KEEP else format
        matrix = empty(target, rows, cols)
        found: Mapping[str, NDArray[np.generic]] = {"w": whole if order is not None else whole[place.rows(rows)]}
        write_rows(matrix, 0, found if target == kept else encode_rows(decode_rows(kept, found, cols), target))
        return matrix


class _GgufStore:
    def __init__(self, file: GgufFile) -> None:
        self._tensors: Mapping[str, GgufTensor] = file.tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, index: NDArray[np.int64] | slice) -> tuple[str, Mapping[str, NDArray[np.generic]]]:
        tensor = self._tensors[name]
        raw = tensor.raw.reshape(-1, tensor.raw.shape[-1])[index]
        if tensor.type in LOSSLESS:
            format, decode = LOSSLESS[tensor.type]
            return format, decode(raw)
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError as error:
            raise ModelError(f"type {tensor.type} needs the gguf package", "pip install gguf") from error
        try:
            return "dequantized", {"w": quants.dequantize(raw, GGMLQuantizationType(tensor.type_id))}
        except NotImplementedError as error:  # of Q8_K and of integers, say, which no model is shipped in
            problem = f"tensor {name} has type {tensor.type}, which the gguf package cannot decode"
            raise ModelError(problem, "choose a file of another type") from error


class _SafetensorsStore:
    def __init__(self, folder: Path) -> None:
        self._files: dict[str, TensorFile] = {}
        index = folder / "model.safetensors.index.json"
        if is_there(index):
            weight_map = _json(index).get("weight_map")
            found = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
            if any(not isinstance(f, str) or Path(f).name != f for f in found):
                raise ModelError(f"{index} names files outside its folder", "fetch the model again")
            paths = [folder / name for name in sorted({str(f) for f in found})]
        else:
            paths = [folder / "model.safetensors"]
        for path in paths:
            file = TensorFile(path, ModelError)
            self._files |= dict.fromkeys(file.tensors, file)
        bases = {name.removesuffix(mxfp4.BLOCKS) for name in self._files if name.endswith(mxfp4.BLOCKS)}
        self.packed = {base for base in bases if base + mxfp4.SCALES in self._files}  # pairs of tensors that make one

    def names(self) -> set[str]:
        return set(self._files) - {base + end for base in self.packed for end in _MXFP4} | self.packed

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.packed:
            return self._files[name].tensors[name].shape
        blocks, scales = (self._files[name + end].tensors[name + end] for end in _MXFP4)
        if blocks.shape != (*scales.shape, 16) or {blocks.tag, scales.tag} != {"U8"} or len(scales.shape) < 2:
            raise ModelError(f"tensor {name} is no MXFP4: blocks are {list(blocks.shape)}", "fetch the model again")
        return (*scales.shape[:-1], 32 * scales.shape[-1])

    def rows(self, name: str, index: NDArray[np.int64] | slice) -> tuple[str, Mapping[str, NDArray[np.generic]]]:
        if name in self.packed:
            blocks, scales = (self._files[name + end].array(name + end).view(np.uint8) for end in _MXFP4)
            blocks, scales = blocks.reshape(-1, *blocks.shape[-2:]), scales.reshape(-1, scales.shape[-1])
            return mxfp4.decode(blocks[index], scales[index])
        file = self._files[name]
        tag = file.tensors[name].tag
        if tag not in _HF_FORMATS:
            raise ModelError(f"tensor {name} has type {tag}", f"supported are {', '.join(_HF_FORMATS)}")
        values = file.array(name)
        values = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[None]
        return _HF_FORMATS[tag], {"w": np.ascontiguousarray(values[index])}


def open_checkpoint(path: str | Path, *, format: str = KEEP, head_format: str | None = None) -> Checkpoint:
    """Opens a .gguf file or a folder with config.json, safetensors and tokenizer.json; no weight is read yet.

    Raises:
        ModelError: it is neither, or of a family or with a setting that is not supported.
    """
    path = Path(path)
    if is_there(path) and path.is_dir():
        return _open_folder(path, format, head_format)
    if path.suffix == ".onnx":
        raise ModelError(f"{path} is an ONNX graph", "plan where to cut it (isthmus plan), and give split the plan")
    if not is_there(path):
        raise ModelError(f"{path} does not exist", "give a .gguf file, a folder with config.json, or a fetched name")
    return _open_gguf(path, format, head_format)


def _open_gguf(path: Path, format: str, head_format: str | None) -> Checkpoint:
    file = GgufFile(path)
    store = _GgufStore(file)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = None
    if "rope_freqs.weight" in shapes:
        kind, values = store.rows("rope_freqs.weight", slice(None))
        factors = decode_rows(kind, values, shapes["rope_freqs.weight"][-1]).reshape(-1)
    _, config = gguf_config.config_from_gguf(file.fields, shapes, factors)
    roles = gguf_config.GGUF_NAMES
    if f"blk.0.{gguf_config.GGUF_OLD_LATENT}" in shapes:
        roles = {**roles, **dict.fromkeys(("k_up", "v_up"), gguf_config.GGUF_OLD_LATENT)}
    names = _names(config, gguf_config.GGUF_TOP, roles, "blk.{i}.", gguf_config.GGUF_EXPERTS)

    def tokenizer() -> Tokenizer:
        from isthmus.split.tokenizer_gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(file.fields)

    permuted = file.fields["general.architecture"] in gguf_config.PERMUTED
    name = _QUANTIZATION.sub("", path.stem)
    return Checkpoint(name, config, store, names, tokenizer, permuted=permuted, format=format, head_format=head_format)


def _open_folder(path: Path, format: str, head_format: str | None) -> Checkpoint:
    if not is_there(path / "config.json"):
        raise ModelError(f"{path} has no config.json", "give a .gguf file or a Hugging Face folder")
    fields = _json(path / "config.json")
    hf_config.config_from_hf(fields)  # an unknown family is told before missing files are
    store = _SafetensorsStore(path)
    family, config = hf_config.config_from_hf(fields, has_head=hf_config.HF_TOP["head"] in store.names())
    experts = family.hf_experts
    if store.packed:  # which is never transposed
        experts = {k: p._replace(transposed=False) if isinstance(p, Place) else p for k, p in experts.items()}
    names = _names(config, hf_config.HF_TOP, hf_config.HF_NAMES, "model.layers.{i}.", experts)

    def tokenizer() -> Tokenizer:
        from isthmus.split.tokenizer import Tokenizer

        return Tokenizer.from_folder(path)

    name = str(fields.get("_name_or_path") or path.resolve().name).rstrip("/").rpartition("/")[2] or "model"
    return Checkpoint(name, config, store, names, tokenizer, permuted=False, format=format, head_format=head_format)


def _names(
    config: DecoderConfig,
    top: Mapping[str, str],
    roles: Mapping[str, str],
    prefix: str,
    experts: Mapping[str, str | Place],
) -> dict[str, Place]:
    """From "embedding", "3.q", "3.experts.0.gate" and so on to places in a checkpoint."""
    names = {key: Place(top[key]) for key in ("embedding", "final_norm") + (() if config.tied else ("head",))}
    for i in range(config.n_layers):
        for role in [*array_shapes(config, i), *matrix_shapes(config, i)]:
            if role in top:
                names[f"{i}.{role}"] = Place(top[role])
                continue
            of_all, _, one = role.partition(".")
            expert, _, kind = one.partition(".") if of_all == "experts" else ("", "", role)
            known: Mapping[str, str | Place] = experts if expert or kind not in roles else roles
            if kind == "q" and config.latent and config.latent.q_rank:
                kind = "q_up"
            if kind not in known:
                raise ModelError(f"the name of {role!r} is not known in family {config.family}", "use safetensors")
            found = known[kind]
            place = found if isinstance(found, Place) else Place(found)
            place = place.of_expert(int(expert)) if expert else place
            names[f"{i}.{role}"] = place._replace(tensor=prefix.format(i=i) + place.tensor)
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}", "fetch the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object", "fetch the model again")
    return found
