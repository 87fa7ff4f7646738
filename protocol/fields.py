"""Bounds of what a message may hold, as types that the decoder checks."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

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
