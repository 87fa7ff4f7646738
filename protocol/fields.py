"""What messages are made of: bounded numbers and names, and the parts that several messages share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

HASH_BYTES = 16
MAX_ROWS = 4096

U8 = Annotated[int, Meta(ge=0, le=2**8 - 1)]
U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack's own unsigned range is the upper bound
I31 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Micros = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(max_length=200)]
Names = Annotated[tuple[Name, ...], Meta(max_length=64)]
Line = Annotated[str, Meta(max_length=1000)]
Hash = Annotated[bytes, Meta(max_length=HASH_BYTES)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Tokens32 = Annotated[list[U32], Meta(max_length=MAX_ROWS)]
Prompt = Annotated[list[U32], Meta(max_length=2**20)]


class Sampler(Struct, array_like=True, frozen=True):
    """How a token is chosen; temperature 0 is greedy. top_k is 31-bit, seed 64-bit, stream 32-bit."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: I31 = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    seed: U64 = 0
    stream: U32 = 0


GREEDY: Sampler = Sampler()


class Tensor(Struct, array_like=True):
    """A coded tensor; `protocol.tensors` encodes and decodes it.

    Attributes:
        codec: "f32", "f16", "int8" or one of `tensors.ENTROPY_CODECS`.
        shape: [rows, width].
        plain: leading rows that are coded as f16 whatever the codec (the lossy ones keep the first position so).
        data: the coded bytes, little-endian; empty on the wire when they follow as frame 1.
        stats: digest of the channel statistics that decoding needs; empty for none.
    """

    codec: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[U32, ...], Meta(min_length=1, max_length=4)]
    plain: U16 = 0
    data: bytes = b""
    stats: Annotated[bytes, Meta(max_length=8)] = b""


class Limits(Struct, array_like=True, frozen=True):
    """What a peer may send to this side.

    Attributes:
        max_message_bytes: largest frame.
        credit_bytes: bytes that may be under way without a Credit.
        heartbeat_ms: this side answers a Ping; after three silent intervals the peer counts as gone.
        max_rows: rows in one Rows message.
    """

    max_message_bytes: U32
    credit_bytes: U32
    heartbeat_ms: U32
    max_rows: U32


class Offer(Struct, array_like=True, frozen=True):
    """A model that this cloud serves.

    Attributes:
        model_id: hex, names weights and configuration.
        name: for people.
        numerics: id of the engine's arithmetic; the same id, model_id and KV format give the same bits.
        exact: whether results are free of batch, chunking and threads.
        kv_formats: such as "f16".
        codecs: tensor codecs that rows may come in.
        context_length: positions that the model was trained for.
        weights: the weights' format, such as "q4" or "keep", for people; empty when it is not told.
        channels: digests of the channel statistics that tensors may be coded with.
        steps: (rows, microseconds) of steps of so many rows of one sequence, each of which is sampled, as measured when
            the service was started; ascending, empty when they are not told.
        row_us: of one row of many of which none is sampled, microseconds; 0 when it is not told.
    """

    model_id: Name
    name: Name
    n_layers: U32
    d_model: U32
    vocab_size: U32
    numerics: Name
    exact: bool
    kv_formats: Names
    codecs: Names
    context_length: U32
    weights: Name = ""
    channels: Annotated[tuple[bytes, ...], Meta(max_length=256)] = ()
    steps: Annotated[tuple[tuple[U32, Micros], ...], Meta(max_length=16)] = ()
    row_us: Micros = 0
