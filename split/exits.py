"""An exit's head as the engine runs it: a linear map, one more decoder layer, and the model's own output head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import SPECIAL, DecoderConfig
from isthmus.engine.part import WeightSource
from isthmus.protocol.channels import SPREAD_MIN, ChannelStats
from isthmus.protocol.errors import BundleError, IsthmusError
from isthmus.quant.packed import LANES, PackedMatrix
from isthmus.split.exit_entry import MAX_HEAD_TOKENS
from isthmus.split.roles import Weights, check_layer
from isthmus.split.tensorfile import TensorFile

MODEL_ID = "model_id"  # in the metadata of an exit's file
HEAD_TOKENS = "head_tokens"
AGAIN = "train it again"
_OURS = ("final_norm", "channel_mean", "channel_spread")  # vectors that are not the layer's


def check_head_fits(config: DecoderConfig, error: type[IsthmusError]) -> None:
    """Refuses models whose states and output heads an exit's head cannot work with.

    Raises:
        IsthmusError: of class `error`, naming what is in the way.
    """
    if found := [name for name in ("layer_norm", "head_bias", "logit_scale", "latent") if name in config.special]:
        raise error(f"exits of models with {', '.join(found)} are not supported", "choose another mode than exit")


class ExitSource:
    """A `WeightSource` with one layer, the exit that stands before the model's layer of the same number.

        exit = bundle.exit(20)
        part = open_part(exit, 20, 21)
        part.step(Rows().hidden(sequence, position, states, enter=20))

    Args:
        model: what the exit belongs to.
        layer: before which it stands.
        weights: a layer's matrices and norms, with `input` [d_model, d_model] and `final_norm` [d_model]; the width of
            the feed-forward network is its own, everything else the model's. With `channel_mean` and `channel_spread`
            [d_model], mean and spread of the hidden states before the layer, as `ChannelStats` has them.
        head_tokens: the tokens that it can name [n] i32, ascending; None for all.

    Attributes:
        channel_mean, channel_spread: [d_model] f32; 0 and 1 where the weights have none.

    Raises:
        BundleError: the weights are not of this model's shapes.
    """

    def __init__(
        self, model: WeightSource, layer: int, weights: Weights, head_tokens: NDArray[np.int32] | None = None
    ) -> None:
        shape, width = model.config, model.config.d_model
        if not 0 < layer < shape.n_layers:
            raise BundleError(f"an exit before layer {layer}", f"choose 1..{shape.n_layers - 1}")
        where = f"the exit before layer {layer}"
        self._model, self._index, self._head_tokens = model, layer, head_tokens
        self._layer = {name: value for name, value in weights.items() if name not in _OURS}
        gate, norm, first = weights.get("gate"), weights.get("final_norm"), weights.get("input")
        if not isinstance(norm, np.ndarray) or norm.shape != (width,):
            raise BundleError(f"{where} has no final_norm [{width}]", AGAIN)
        if not isinstance(first, PackedMatrix) or (first.rows, first.cols) != (width, width):
            raise BundleError(f"{where} has no input [{width}, {width}]", AGAIN)
        mean = weights.get("channel_mean", np.zeros(width, np.float32))
        spread = weights.get("channel_spread", np.ones(width, np.float32))
        for name, vector in (("channel_mean", mean), ("channel_spread", spread)):
            if not isinstance(vector, np.ndarray) or vector.shape != (width,) or not np.isfinite(vector).all():
                raise BundleError(f"{where} has no finite {name} [{width}]", AGAIN)
        assert isinstance(mean, np.ndarray) and isinstance(spread, np.ndarray)
        if (spread < 0).any():
            raise BundleError(f"{where} has a negative channel_spread", AGAIN)
        for name, weight in weights.items():
            arrays = weight.arrays.values() if isinstance(weight, PackedMatrix) else (weight,)
            if not all(np.isfinite(one).all() for one in arrays if one.dtype.kind == "f"):
                raise BundleError(f"{where} has a {name} that is not finite", AGAIN)
        self._norm, self.channel_mean, self.channel_spread = norm, mean, spread
        check_head_fits(shape, BundleError)
        if head_tokens is not None and not (
            head_tokens.ndim == 1
            and 0 < len(head_tokens) <= MAX_HEAD_TOKENS
            and head_tokens[0] >= 0
            and head_tokens[-1] < shape.vocab_size
            and (np.diff(head_tokens) > 0).all()
        ):
            problem = f"{where} has head_tokens that do not ascend within the vocabulary of {shape.vocab_size}"
            raise BundleError(problem, f"{AGAIN} with at most {MAX_HEAD_TOKENS}")
        self._config = replace(
            shape,
            n_layers=layer + 1,
            d_ff=gate.rows if isinstance(gate, PackedMatrix) else shape.d_ff,
            qkv_bias=False,
            qk_norm=False,
            windows=(),
            experts=None,
            tied=False,
            **{name: default for name, default in SPECIAL.items() if name != "latent"},
        )
        check_layer(self._config, layer, {n: w for n, w in self._layer.items() if n != "input"}, BundleError)

    @classmethod
    def from_file(cls, model: WeightSource, model_id: str, layer: int, file: TensorFile) -> ExitSource:
        """Of an exit's file.

        Args:
            model_id: of the model, for which the exit must have been trained.

        Raises:
            BundleError: it was trained for another model, or its weights are not of this model's shapes.
        """
        trained_for = file.metadata.get(MODEL_ID)
        if trained_for != model_id:
            problem = f"{file.path.name} was trained for the model {str(trained_for)[:32]}, not for {model_id}"
            raise BundleError(problem, "train exits for this bundle: isthmus exits train")
        tokens = None
        if HEAD_TOKENS in file.tensors:
            tokens = file.array(HEAD_TOKENS)
            if tokens.dtype != np.int32:
                raise BundleError(f"{HEAD_TOKENS} of the exit before layer {layer} is {tokens.dtype}", AGAIN)
        return cls(
            model, layer, file.weights(but=(HEAD_TOKENS,)), tokens.view(np.int32) if tokens is not None else None
        )

    @property
    def channels(self) -> ChannelStats:
        """What is known of the channels before the exit, for the codecs of hidden states."""
        return ChannelStats(self.channel_mean, np.maximum(self.channel_spread, np.float32(SPREAD_MIN)))

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def embedding(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._model.embedding()

    def layer(self, index: int) -> Weights:
        """See `WeightSource`.

        Raises:
            BundleError: another layer than the exit's.
        """
        if index != self._index:
            raise BundleError(f"an exit has no layer {index}", f"open it as layers [{self._index}, {self._index + 1})")
        return self._layer

    def final_norm(self) -> NDArray[np.float32]:
        """See `WeightSource`."""
        return self._norm

    def head_tokens(self) -> NDArray[np.int32] | None:
        """Which token each row of `head()` stands for [n] i32, ascending; None where it is the model's whole head."""
        return self._head_tokens

    def head(self) -> PackedMatrix:
        """The model's output head, or its rows of `head_tokens()`, copied."""
        head = self._model.head()
        if self._head_tokens is None:
            return head
        return head_rows(head, self._head_tokens)


def head_rows(matrix: PackedMatrix, rows: NDArray[np.int32]) -> PackedMatrix:
    """Some rows of a packed matrix, in the given order, as they are packed: nothing is quantized again."""
    blocks = -(-len(rows) // LANES)
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, array in matrix.arrays.items():
        lines, width = array.shape[1], array.shape[2] // LANES  # a row's values of a line stand together
        taken = np.zeros((blocks * LANES, lines, width), array.dtype)
        taken[: len(rows)] = array.reshape(-1, lines, LANES, width)[rows // LANES, :, rows % LANES]
        lanes_last = taken.reshape(blocks, LANES, lines, width).transpose(0, 2, 1, 3)
        arrays[name] = np.ascontiguousarray(lanes_last).reshape(blocks, lines, LANES * width)
    return PackedMatrix(matrix.format, len(rows), matrix.cols, arrays)
