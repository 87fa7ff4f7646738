"""What a generation yields, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["device", "cloud", "split", "verified", "exit"]
Mode = Literal["auto", "local", "stream", "split", "verify", "exit"]
MODES: tuple[Mode, ...] = ("auto", "local", "stream", "split", "verify", "exit")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        id: the token's id; the end-of-sequence token is yielded too, as the last one.
        text: what this token adds to the text. It may be empty while a character or a stop word is incomplete, and
            the joined texts of all tokens are the whole answer, if no guesses were taken back (see `position`).
        source: where it was computed: "device" and "cloud" ran the whole model, "split" is both, "verified" was
            drafted on the device and is what the cloud's model says, and "exit" is an exit's word alone.
        position: index in the conversation's token log. Where it is not the next one after the token before, guesses
            were taken back from there on (a `Rollback`), and this token takes their place.
        finish: on the last token why it is the last: "eos", "stop" (a stop word), or "length"; else empty.
        verified: off for a guess that was made while the cloud was silent. It stands once a token that is not a guess
            follows, or the answer ends without a `Rollback`.
    """

    id: int
    text: str
    source: Source
    position: int
    finish: str = ""
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Rollback:
    """Guesses that the cloud, back again, would not have made.

    Attributes:
        position: of the first of them in the token log.
        tokens: ids of all tokens from there on.
        text: what they added to the text.
    """

    position: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class CutOff:
    """An answer that did not come to its end, as a device takes it up again.

    Attributes:
        text: what it says so far.
        question: the last message that it answers; without a chat, the text that it goes on from.
    """

    text: str
    question: str


@dataclass(slots=True)
class Stats:
    """What one generation cost.

    Attributes:
        tokens: ids, the end-of-sequence token included.
        text: the answer.
        sources: where each token was computed.
        prompt_tokens: tokens that were not generated.
        reused_tokens: of those, the ones whose KV was already held where they were needed.
        ttft_ms: from the call to the first token.
        tok_s: tokens a second after the first one; 0 when there was only one.
        bytes_up, bytes_down: bytes of messages, without the transport's own framing.
        round_trips: questions to the cloud whose answer was waited for.
        cloud_ms: time in the cloud's engine, as its answers say.
        drafted, accepted: guesses that the cloud checked, and those of them that were right.
        drafts, drafting_ms: guesses that were made in verify mode, those that were never checked among them, and the
            time that took.
        filled: in exit mode, layers times tokens that the cloud computed of states about which nobody asked, since
            later answers need them; the prompt's are not among them.
        unverified: tokens that were guessed while the cloud was silent, stand, and were never confirmed.
        replaced: guesses that were made so and taken back.
        finish: why it ended: "eos", "stop", "length", or "cancelled" (without the guesses that nobody had confirmed,
            unless these are to stand); empty while it runs.
        note: what did not go as asked, such as a cloud that went away; empty when all went well.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sources: list[Source] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    ttft_ms: float = 0.0
    tok_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    round_trips: int = 0
    cloud_ms: float = 0.0
    drafted: int = 0
    accepted: int = 0
    drafts: int = 0
    drafting_ms: float = 0.0
    filled: int = 0
    unverified: int = 0
    replaced: int = 0
    finish: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "tokens": self.tokens,
            "text": self.text,
            "sources": list(self.sources),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "ttft_ms": round(self.ttft_ms, 3),
            "tok_s": round(self.tok_s, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "round_trips": self.round_trips,
            "cloud_ms": round(self.cloud_ms, 3),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "drafts": self.drafts,
            "drafting_ms": round(self.drafting_ms, 3),
            "filled": self.filled,
            "unverified": self.unverified,
            "replaced": self.replaced,
            "finish": self.finish,
            "note": self.note,
        }
