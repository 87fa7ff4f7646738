"""The models behind a service: a part that computes, the files that devices may fetch, and the sessions on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cloud.context import Context
from isthmus.cloud.files import BundleFiles
from isthmus.cloud.pace import measured
from isthmus.cloud.scheduler import State
from isthmus.cloud.session import Session
from isthmus.cloud.spill import Spill
from isthmus.engine.part import KV_BLOCK, KvConfig, Part
from isthmus.engine.slow import slowed
from isthmus.protocol.chain import Chain
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.errors import OutOfBlocks, ServiceError
from isthmus.protocol.messages import Offer
from isthmus.protocol.tensors import CODECS, ENTROPY_CODECS

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer


@dataclass(eq=False)
class Model:
    """A model being served.

    Attributes:
        offer: what Welcome says of it.
        part: runs all its layers.
        kv: format and size of the part's KV.
        channels: what is known of the channels before some layers.
        context: KV that sessions leave for others, None where the back end cannot.
        files: its bundle for devices, None when it is not given out.
        sessions: all that use it.
        ready: those with work for the engine, by number.
        schedule: the scheduler's memory.
    """

    offer: Offer
    part: Part
    kv: KvConfig
    files: BundleFiles | None = None
    channels: dict[int, ChannelStats] = field(default_factory=dict)
    context: Context | None = None
    sessions: set[Session] = field(default_factory=set)
    ready: dict[int, Session] = field(default_factory=dict)
    schedule: State = field(default_factory=State)
    closed: bool = False

    @property
    def pool_tokens(self) -> int:
        """KV positions that sessions may have of the part's pool, in whole blocks."""
        pinned = self.context.pinned_tokens if self.context is not None else 0
        return -(-self.kv.max_tokens // KV_BLOCK) * KV_BLOCK - pinned

    def close(self) -> None:
        """Frees the engine and the files; may be called twice."""
        if self.closed:
            return
        self.closed = True
        for session in self.sessions:
            session.sequence.close()
        self.sessions.clear()
        self.ready.clear()
        if self.context is not None:
            self.context.close()
        self.part.close()
        if self.files is not None:
            self.files.close()


def serve_part(
    part: Part,
    model_id: str,
    name: str,
    *,
    kv: KvConfig | None = None,
    files: BundleFiles | None = None,
    weights: str = "",
    channels: dict[int, ChannelStats] | None = None,
    steps: tuple[tuple[int, int], ...] = (),
    row_us: int = 0,
) -> Model:
    """A model from a part that is open already.

    Args:
        weights: the weights' format, for people.
        channels: statistics of the channels before some layers, with which devices may code hidden states.
        steps, row_us: how fast it is, as in `protocol.fields.Offer`.

    Raises:
        ServiceError: the part lacks the model's last layers.
    """
    config = part.config
    if part.end != config.n_layers:
        raise ServiceError(f"{name} ends at layer {part.end} of {config.n_layers}", "a cloud needs the last layers")
    kv = kv or KvConfig()
    offer = Offer(
        model_id,
        name,
        config.n_layers,
        config.d_model,
        config.vocab_size,
        part.numerics.id,
        part.numerics.exact,
        (kv.format,),
        CODECS + ENTROPY_CODECS,
        config.context_length,
        weights,
        tuple(stats.digest for stats in (channels or {}).values()),
        steps,
        row_us,
    )
    context = Context(part) if part.numerics.exact else None  # else what others computed is not what it would be
    return Model(offer, part, kv, files, channels or {}, context)


def load(
    folder: Path,
    *,
    threads: int = 0,
    kv: KvConfig | None = None,
    slow_down: float = 1.0,
    spill: Callable[[int], Spill] | None = None,
    pinned: Sequence[str] = (),
) -> Model:
    """A model from a bundle's folder.

    Args:
        threads: of the engine, 0 for its own choice.
        slow_down: pretends to be a model so many times larger, by waiting in proportion to what it computes.
        spill: makes the place on disk for KV that is kept, in slots of so many bytes; None for none.
        pinned: system prompts whose KV is computed now, and kept for everybody.

    Raises:
        BundleError: no bundle, or not a whole one.
        EngineError: no back end runs it here.
        ModelError: system prompts are pinned of a model without a chat template.
        ServiceError: there is no such place, or no room for a system prompt.
    """
    from isthmus.engine import open_part
    from isthmus.split.bundle import Bundle

    bundle = Bundle.open(folder)
    kv = kv or KvConfig()
    part = slowed(open_part(bundle, 0, bundle.config.n_layers, threads=threads, kv=kv), slow_down)
    listing = bundle.manifest
    files = BundleFiles(folder)
    channels = {entry.layer: bundle.exit(entry.layer).channels for entry in bundle.exits if bundle.holds(entry.file)}
    steps, row_us = measured(part)
    model = serve_part(
        part,
        listing.model_id,
        listing.name,
        kv=kv,
        files=files,
        weights=listing.weights,
        channels=channels,
        steps=steps,
        row_us=row_us,
    )
    try:
        if model.context is not None:
            if spill is not None:
                model.context.spill = spill(KV_BLOCK * part.kv_bytes_per_token)
            for prompt in pinned:
                _pin(model.context, opening(bundle.tokenizer(), prompt), kv)
    except BaseException:
        model.close()
        raise
    return model


def opening(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens with which every conversation under that system prompt begins.

    Raises:
        ModelError: the model has no chat template, or its template takes no system prompt.
    """
    system = {"role": "system", "content": prompt}
    one, other = (Chain(tokenizer.chat([system, {"role": "user", "content": text}])) for text in ("a", "b"))
    return one.tokens[: one.common(other)]


def _pin(context: Context, tokens: list[int], kv: KvConfig) -> None:
    try:
        context.pin(tokens)
    except OutOfBlocks as error:
        problem = f"a system prompt of {len(tokens)} tokens does not fit into KV for {kv.max_tokens}"
        raise ServiceError(problem, "raise --kv-tokens, or pin less") from error
