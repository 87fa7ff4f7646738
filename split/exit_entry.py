"""What a bundle says of its exits, in `bundle.json`."""

from __future__ import annotations

import msgspec

from isthmus.protocol.errors import BundleError
from isthmus.protocol.tensors import CODECS, ENTROPY_CODECS
from isthmus.split.certificate import Certificate

MAX_HEAD_TOKENS = 8192
MAX_ROW_BYTES = 1 << 20


def exit_file(layer: int) -> str:
    """The name of the weight file of the exit before a layer."""
    return f"exits/layer-{layer:03d}.safetensors"


class Agreement(msgspec.Struct, frozen=True):
    """Shares of tokens at which an exit names the model's greedy choice, on what it was not trained on.

    Attributes:
        documents: along held-out documents.
        answers: along the model's own answers to held-out questions.
    """

    documents: float
    answers: float


class CodecChoice(msgspec.Struct, frozen=True):
    """How states travel from an exit to the cloud, picked by what it changes in the model's choices.

    Attributes:
        name: the codec, one of `CODECS` or `ENTROPY_CODECS`.
        exit: sha256 of the exit's file, whose statistics of the channels it takes.
        data: hash of the answers on which it was tried.
        tokens: of them.
        loss: share of tokens that it was allowed to change beyond what f16 does.
        agreement: share of tokens at which the model chooses behind it as it did.
        exact: the same behind f16.
        row_bytes: mean of a row's.
    """

    name: str
    exit: str
    data: str
    tokens: int
    loss: float
    agreement: float
    exact: float
    row_bytes: float

    def check(self, where: str) -> None:
        """Compares with what can be.

        Raises:
            BundleError: an unknown codec, or a value that cannot be.
        """
        shares = (self.loss, self.agreement, self.exact)
        if self.name not in CODECS + ENTROPY_CODECS:
            raise BundleError(f"{where} has a codec {self.name[:16]!r} that is not known", "calibrate it again")
        if self.tokens < 1 or not all(0 <= share <= 1 for share in shares) or not 0 < self.row_bytes < MAX_ROW_BYTES:
            raise BundleError(f"{where} has a codec with values that cannot be", "calibrate it again")


class ExitEntry(msgspec.Struct, frozen=True):
    """An exit: which states it takes and how far it is to be trusted.

    Attributes:
        layer: before which it stands.
        file: of its weights, `exit_file(layer)`.
        d_ff: width of its feed-forward network.
        head_tokens: tokens that its output head can name, 0 for all.
        certificate: None until it is calibrated: then it may draft, but not emit.
        codec: how states before it travel to the cloud; None until that is measured.
    """

    layer: int
    file: str
    d_ff: int
    head_tokens: int
    agreement: Agreement
    certificate: Certificate | None = None
    codec: CodecChoice | None = None

    def check(self, n_layers: int, sha256: str | None) -> None:
        """Compares an entry with the model and its file's listed hash, None if it is not listed.

        Raises:
            BundleError: a value that cannot be, or a certificate of other weights.
        """
        where = f"bundle.json: the exit before layer {self.layer}"
        if not 0 < self.layer < n_layers:
            raise BundleError(f"bundle.json has an exit before layer {self.layer} of {n_layers}", "train it again")
        if self.file != exit_file(self.layer) or sha256 is None:
            raise BundleError(f"{where} has no file {exit_file(self.layer)}", "train it again")
        shares = (self.agreement.documents, self.agreement.answers)
        if self.d_ff < 1 or not 0 <= self.head_tokens <= MAX_HEAD_TOKENS or not all(0 <= s <= 1 for s in shares):
            raise BundleError(f"{where} has values that cannot be", "train it again")
        if self.certificate is not None:
            self.certificate.check(where)
            if self.certificate.exit != sha256:
                raise BundleError(f"{where} has a certificate of other weights", "calibrate it again")
        if self.codec is not None:
            self.codec.check(where)
            if self.codec.exit != sha256:
                raise BundleError(f"{where} has a codec that was measured with other weights", "calibrate it again")


def check_exits(exits: tuple[ExitEntry, ...], n_layers: int, hashes: dict[str, str]) -> None:
    """Checks all exits of a bundle, in ascending order.

    Args:
        hashes: of the bundle's files, by name.

    Raises:
        BundleError: see `ExitEntry.check`; or two exits before one layer.
    """
    for entry in exits:
        entry.check(n_layers, hashes.get(entry.file))
    layers = [entry.layer for entry in exits]
    if layers != sorted(set(layers)):
        raise BundleError(f"bundle.json lists exits before layers {layers}", "train them again")
