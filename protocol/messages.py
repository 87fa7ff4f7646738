"""Everything that travels between a device and a cloud: one tagged union of msgpack arrays.

Frame 0 of a message is a msgpack array whose first element is the message's tag; the others are its fields in order.
A tensor of more than `INLINE_BYTES` leaves its `data` empty and follows as a raw second frame. Fields are only ever
added at the end, with a default: an older reader ignores what it does not know. Positions count tokens of a session
from 0; `prefix_hash` is the chain (`protocol.chain`) over all tokens before a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, Struct

from isthmus.protocol import arrays, codes, fields
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.fields import (
    HASH_BYTES,
    MAX_ROWS,
    U8,
    U16,
    U32,
    Hash,
    Line,
    Micros,
    Name,
    Names,
    Prompt,
    SessionId,
    Tokens32,
)
from isthmus.protocol.graph_messages import Infer as Infer
from isthmus.protocol.graph_messages import Inferred as Inferred

Code = codes.Code  # what stands in messages may be named as they are
Sampler = fields.Sampler
Tensor = fields.Tensor
Limits = fields.Limits
Offer = fields.Offer
GraphOffer = arrays.GraphOffer
GREEDY = fields.GREEDY

VERSION = 1
MIN_VERSION = 1
INLINE_BYTES = 16 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_RANGE_BYTES = 64 * 1024
MAX_PADDING = 16 * 1024
MAX_DRAFT = 32
MAX_PREFIXES = 64 * 1024  # bytes: of 131,072 tokens
CAN_VERIFY = "draft"  # among Welcome's capabilities: Draft and Fill are understood

WANT_NONE, WANT_HIDDEN, WANT_SAMPLE = 0, 1, 4  # the same bits as engine.part.Want


class Hello(Struct, array_like=True, tag=1):
    """Device -> cloud, first on every connection. Its layout never changes."""

    version: U32
    min_version: U32
    capabilities: Names = ()
    agent: Name = ""


class Welcome(Struct, array_like=True, tag=2):
    """Cloud -> device: the version agreed on, what is served, and the cloud's limits.

    Attributes:
        offers, graphs: language models, and networks that were cut in two.
    """

    version: U32
    min_version: U32
    capabilities: Names
    offers: Annotated[tuple[Offer, ...], Meta(max_length=256)]
    limits: Limits
    graphs: Annotated[tuple[GraphOffer, ...], Meta(max_length=256)] = ()


class Open(Struct, array_like=True, tag=3):
    """Device -> cloud: opens a session, or takes an old one up again (same id, same key).

    Attributes:
        session: 16 random bytes chosen by the device.
        alias: small number that stands for the session on this connection.
        epoch: fencing number, raised by the device at every new start; lower ones are refused from then on.
        model_id: hex.
        enter: layer before which the rows enter: 0 for tokens, k for hidden states. A change empties the session.
        kv_format: "f16" or "f32".
        window: 0 fails with KV_FULL when the context is full, n > 0 lets attention see the last n positions only.
        numerics: required numerics id, empty for any.
        max_positions: positions that the device expects to need, 0 for unknown; admission only.
        prefixes: what the session is to begin with, as far as the cloud holds it: `chain.Chain.names`.
        source: what hidden states were made by and how they are coded; sessions of the same source begin alike.
    """

    session: SessionId
    alias: U32
    epoch: U32
    model_id: Name
    enter: U16 = 0
    kv_format: Name = "f16"
    window: U32 = 0
    numerics: Name = ""
    max_positions: U32 = 0
    prefixes: Annotated[bytes, Meta(max_length=MAX_PREFIXES)] = b""
    source: Name = ""


class Opened(Struct, array_like=True, tag=4):
    """Cloud -> device: the session stands; rows go on at `committed`.

    Attributes:
        committed: positions that the cloud holds, rows of a `Fill` that are not computed yet among them.
        prefix_hash: chain over those.
        idle_s: seconds without a message after which the session is forgotten.
    """

    alias: U32
    epoch: U32
    committed: U32
    prefix_hash: Hash
    numerics: Name
    kv_format: Name
    idle_s: U32 = 0


class Rows(Struct, array_like=True, tag=5):
    """Device -> cloud: computes consecutive positions, and answers with one Result.

    Several may be under way; they are computed in order. Repeating one gives the same Result from the log.

    Attributes:
        position: of the first row.
        prefix_hash: chain over the tokens before `position`.
        tokens: token ids of the rows, [n]; with `hidden` they only feed the log and the chain.
        hidden: [n, d_model] entering at the session's `enter`; none when tokens enter at layer 0.
        want: WANT_SAMPLE, WANT_HIDDEN (both may be set) or WANT_NONE (prefill ahead), of the last row.
        sampler: for WANT_SAMPLE.
        budget_ms: from receipt until the answer must be sent, 0 for no deadline.
        want_all: every row gives what `want` says.
    """

    alias: U32
    epoch: U32
    position: U32
    prefix_hash: Hash
    tokens: Tokens32
    hidden: Tensor | None = None
    want: U8 = WANT_SAMPLE
    sampler: Sampler = GREEDY
    budget_ms: U32 = 0
    want_all: bool = False


class Result(Struct, array_like=True, tag=6):
    """Cloud -> device: what a Rows gave; also the answer to Truncate (no tokens).

    Attributes:
        position: of the request.
        tokens: sampled tokens, one for the last row or one for each.
        committed: positions held now, as in `Opened`.
        prefix_hash: chain over `committed` tokens.
        engine_us: time in the engine, microseconds.
        queue_us: from receipt to the first step, microseconds.
        hidden: [n, d_model] in f32 when wanted.
    """

    alias: U32
    epoch: U32
    position: U32
    tokens: Tokens32
    committed: U32
    prefix_hash: Hash
    engine_us: Micros = 0
    queue_us: Micros = 0
    hidden: Tensor | None = None


class Generate(Struct, array_like=True, tag=7):
    """Device -> cloud: the whole model goes on by itself and streams Tokens.

    Attributes:
        position: of the first of `tokens`, at most the committed length.
        tokens: the prompt's rest; what overlaps the committed log must agree with it.
        max_tokens: tokens to generate.
        stop: token ids that end the stream (they are sent, as the last).
        budget_ms: from receipt to the end of the stream, 0 for no deadline.
    """

    alias: U32
    epoch: U32
    position: U32
    prefix_hash: Hash
    tokens: Prompt
    max_tokens: U32
    sampler: Sampler = GREEDY
    stop: Annotated[tuple[U32, ...], Meta(max_length=256)] = ()
    budget_ms: U32 = 0


class Tokens(Struct, array_like=True, tag=8):
    """Cloud -> device: generated tokens.

    Attributes:
        position: index in the session of the first of `tokens`.
        done: whether this is the last of the stream.
        reason: when done: "stop", "length", "cancelled", "deadline" or "full".
        committed: positions held now; the last generated token is not among them until it is sent back.
        prefix_hash: chain over `committed` tokens.
        engine_us: time in the engine since the last Tokens, microseconds.
    """

    alias: U32
    epoch: U32
    position: U32
    tokens: Tokens32
    done: bool
    reason: Name
    committed: U32
    prefix_hash: Hash
    engine_us: Micros = 0


class Cancel(Struct, array_like=True, tag=9):
    """Device -> cloud: drops the session's waiting rows and ends its stream with "cancelled"."""

    alias: U32
    epoch: U32


class Close(Struct, array_like=True, tag=10):
    """Device -> cloud: forgets the session and frees its KV; no answer."""

    alias: U32
    epoch: U32


class Truncate(Struct, array_like=True, tag=11):
    """Device -> cloud: forgets positions from `length` on, and raises the epoch; answered by a Result.

    `epoch` must exceed the session's; equal is taken as a repetition and answered without a change.
    """

    alias: U32
    epoch: U32
    length: U32


class Ping(Struct, array_like=True, tag=12):
    """Either way: answer with a Pong at once. sent_us is the sender's own clock, returned untouched.

    Attributes:
        padding: bytes that say nothing, to see how long they take.
        wanted: bytes that the answer shall have.
    """

    sent_us: Micros
    padding: Annotated[bytes, Meta(max_length=MAX_PADDING)] = b""
    wanted: Annotated[int, Meta(ge=0, le=MAX_PADDING)] = 0


class Pong(Struct, array_like=True, tag=13):
    """Answer to a Ping."""

    sent_us: Micros
    padding: Annotated[bytes, Meta(max_length=MAX_PADDING)] = b""


class Credit(Struct, array_like=True, tag=14):
    """Receiver -> sender: that many more bytes may be under way."""

    granted_bytes: U32


class Fault(Struct, array_like=True, tag=15):
    """A request was refused; for people `problem` and `remedy`, for programs `code`.

    Attributes:
        retry_ms: when to try again, 0 for never as it stands.
        alias, epoch, position: of the request; alias is None when it concerns the whole connection.
        committed, prefix_hash: what the session holds, when it is known.
        request: the number of an Infer; 0 when it concerns none.
    """

    code: Code
    problem: Line
    remedy: Line = ""
    retry_ms: U32 = 0
    alias: U32 | None = None
    epoch: U32 = 0
    position: U32 = 0
    committed: U32 = 0
    prefix_hash: Hash = b""
    request: U32 = 0


class GetManifest(Struct, array_like=True, tag=16):
    """Device -> cloud: asks for a bundle's `bundle.json`. An empty model_id stands for the only bundle."""

    model_id: Name


class Manifest(Struct, array_like=True, tag=17):
    """Cloud -> device: `bundle.json` byte for byte."""

    model_id: Name
    data: Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]


class GetRange(Struct, array_like=True, tag=18):
    """Device -> cloud: asks for bytes [offset, offset + length) of a bundle's file.

    Attributes:
        name: the file's name in the manifest.
        sha256: 64 hex digits from the manifest.
        length: 1 to 65,536 bytes; a shorter answer ends the file.
    """

    model_id: Name
    name: Name
    sha256: Annotated[str, Meta(min_length=64, max_length=64)]
    offset: Micros
    length: Annotated[int, Meta(ge=1, le=MAX_RANGE_BYTES)]


class Range(Struct, array_like=True, tag=19):
    """Cloud -> device: bytes of a file from `offset` on; `total_bytes` is the whole file's length."""

    model_id: Name
    name: Name
    offset: Micros
    total_bytes: Micros
    data: Annotated[bytes, Meta(max_length=MAX_RANGE_BYTES)]


class Bye(Struct, array_like=True, tag=20):
    """Cloud -> device: the service stops; sessions may be lost after grace_ms."""

    grace_ms: U32
    problem: Line = ""


class Draft(Struct, array_like=True, tag=21):
    """Device -> cloud: guesses at what the whole model says next, to be checked in one pass.

    The first follows what the log holds or earlier blocks promise; where the log knows what was sampled there, it must
    be that. A block that builds on what was not accepted is dropped without a word: the answer to what came before has
    told that already. Repeating one gives the same Verdict from the log.

    Attributes:
        position: of the first token, at least 1.
        prefix_hash: the first 4 bytes or more of the chain over the tokens before `position`.
        tokens: the guesses, [n].
        hidden: [n, d_model], in sessions whose rows enter at a layer above 0; the first token is taken as it is there.
        sampler: how the model's own tokens are chosen; none for the one that is in use.
        firm: bit i is set where token i stands whatever the model says, as an exit's that is sure of it.
    """

    alias: U32
    epoch: U32
    position: U32
    prefix_hash: Annotated[bytes, Meta(min_length=4, max_length=HASH_BYTES)]
    tokens: Annotated[list[U32], Meta(min_length=1, max_length=MAX_DRAFT)]
    hidden: Tensor | None = None
    sampler: Sampler | None = None
    firm: U32 = 0


class Fill(Struct, array_like=True, tag=23):
    """Device -> cloud: rows that nobody waits for, computed in one pass with the question that follows; no answer.

    Attributes:
        position, prefix_hash, tokens, hidden: as in `Draft`, but the tokens are the conversation's own.
    """

    alias: U32
    epoch: U32
    position: U32
    prefix_hash: Annotated[bytes, Meta(min_length=4, max_length=HASH_BYTES)]
    tokens: Annotated[list[U32], Meta(min_length=1, max_length=MAX_ROWS)]
    hidden: Tensor | None = None


class Verdict(Struct, array_like=True, tag=22):
    """Cloud -> device: how many guesses of a Draft are what the model says, and its own next token.

    Attributes:
        position: of the request.
        accepted: leading tokens of the block that are right or firm, at least 1; they are committed.
        token: what follows them.
        prefix_hash: chain over the `position + accepted` tokens that are committed.
        engine_us: time in the engine, microseconds.
        queue_us: from receipt to the first step, microseconds.
    """

    alias: U32
    epoch: U32
    position: U32
    accepted: Annotated[int, Meta(ge=1, le=MAX_DRAFT)]
    token: U32
    prefix_hash: Hash
    engine_us: Micros = 0
    queue_us: Micros = 0


Message: TypeAlias = (
    Hello
    | Welcome
    | Open
    | Opened
    | Rows
    | Result
    | Generate
    | Tokens
    | Cancel
    | Close
    | Truncate
    | Ping
    | Pong
    | Credit
    | Fault
    | GetManifest
    | Manifest
    | GetRange
    | Range
    | Bye
    | Draft
    | Verdict
    | Fill
    | Infer
    | Inferred
)

_DRAFT_TAG = Draft.__struct_config__.tag
_encode = msgspec.msgpack.Encoder().encode
_decode: Any = msgspec.msgpack.Decoder(Message).decode


def encode(message: Message) -> list[bytes]:
    """A message as one frame, or two when its tensor is larger than `INLINE_BYTES`."""
    if isinstance(message, Rows | Result | Draft | Fill):
        tensor = message.hidden
        if tensor is not None and len(tensor.data) > INLINE_BYTES:
            bare = Tensor(tensor.codec, tensor.shape, tensor.plain, b"", tensor.stats)
            return [_encode(msgspec.structs.replace(message, hidden=bare)), tensor.data]
    if isinstance(message, Infer | Inferred) and len(message.data) > INLINE_BYTES:
        return [_encode(msgspec.structs.replace(message, data=b"")), message.data]
    if type(message) is Draft:  # the smallest and most frequent one: three bytes count
        return [_encode(_shortened(message))]
    return [_encode(message)]


def _shortened(draft: Draft) -> list[Any]:
    """A draft as an array that ends with its last field that is not the default."""
    fields = [_DRAFT_TAG, *msgspec.structs.astuple(draft)]
    while fields[-1] is None or fields[-1] == 0:
        fields.pop()
    return fields


def decode(frames: Sequence[bytes]) -> Message:
    """The message in `frames`, every field checked against its bounds.

    Raises:
        ProtocolError: not a message of this protocol.
    """
    if not 1 <= len(frames) <= 2:
        raise ProtocolError(f"a message has {len(frames)} frames", "send one, or two with a large tensor")
    try:
        message: Message = _decode(frames[0])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise ProtocolError(f"malformed message: {error}", "both sides must speak the same protocol") from error
    if isinstance(message, Rows | Result | Draft | Fill):
        tensor = message.hidden
        if len(frames) == 2:
            if tensor is None or tensor.data:
                raise ProtocolError("a second frame without a tensor that needs it")
            tensor.data = frames[1]
    elif isinstance(message, Infer | Inferred):
        if len(frames) == 2:
            if message.data:
                raise ProtocolError("a second frame beside arrays that have their bytes already")
            message.data = frames[1]
    elif len(frames) == 2:
        raise ProtocolError(f"a {type(message).__name__} has one frame, not two")
    return message


def agree(version: int, min_version: int, *, ours: int = VERSION, ours_min: int = MIN_VERSION) -> int | None:
    """The highest version that both sides speak, or None."""
    common = min(version, ours)
    return common if common >= max(min_version, ours_min) else None
