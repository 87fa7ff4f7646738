"""What the device knows of one session in the cloud."""

from __future__ import annotations

import os

from isthmus.protocol.chain import BLOCK, NAME_BYTES, ROOT, Chain
from isthmus.protocol.messages import MAX_PREFIXES, Open, Truncate

EXACT = ("", "f32")  # codecs behind which a row is what it was
_WORTH_ASKING = 64  # tokens that the cloud may have by others: fewer are sooner computed than asked for


class Lane:
    """One session in the cloud: rows that enter before one layer, over the device's token log.

    The cloud keeps whole-model KV and the KV of [k, L) apart, so a device has one lane for each; both follow the same
    log, and each may be behind it.

    Attributes:
        alias: the session's number on a connection.
        enter: layer before which rows enter, 0 for tokens.
        codec: how they travel, "" for tokens: what is made of rounded rows is not what others would make.
        epoch: fencing number, raised before every Open and Truncate.
        opened: whether the cloud knows the lane on this connection.
        committed: positions that the cloud holds, as last told.
        head: chain over those positions, as last told.
        sent: positions that it was ever sent or said to hold, whatever became of them.
        agreed: leading positions at which the cloud's log is known to be the device's.
        streamed: position of the first token that was asked for as a stream in this epoch, 0 for none.
        expects: the length and the chain that a cut leaves which has not been answered; None for no such cut.
        limit: how much of the log it may keep, while it is being aligned.
        loose: whether it may hold more than was told, as something was given up: it is cut back before its next use.
        ahead: positions that it holds if all that was sent ahead has come; at least `committed`.
        turned: whether the log went on to another text since the cloud was asked what it has of it.
    """

    __slots__ = (
        "_tail",
        "agreed",
        "ahead",
        "alias",
        "codec",
        "committed",
        "enter",
        "epoch",
        "expects",
        "head",
        "limit",
        "loose",
        "opened",
        "sent",
        "session",
        "streamed",
        "turned",
    )

    def __init__(self, alias: int, enter: int, codec: str = "") -> None:
        self.alias = alias
        self.enter, self.codec = enter, codec
        self.epoch = self.limit = 0
        self.renew()

    def renew(self) -> None:
        """Takes a fresh, empty session."""
        self.session = os.urandom(16)
        self.opened = self.loose = self.turned = False
        self.agreed = 0
        self.sent = 0
        self.streamed = 0
        self.expects: tuple[int, bytes] | None = None
        self.stands(0, ROOT)

    def stands(self, committed: int, head: bytes) -> None:
        """The cloud holds that, and no more."""
        self.committed = self.ahead = committed
        self.head = self._tail = head

    def filled(self, end: int, head: bytes) -> None:
        """Rows up to `end`, with that chain, were sent ahead, and no answer will tell."""
        self.ahead, self._tail = end, head
        self.sent = max(self.sent, end)

    def strays(self, log: Chain) -> bool:
        """Whether rows were sent ahead that are not the log's."""
        return self.ahead > len(log) or log.at(self.ahead) != self._tail

    def unsure(self, log: Chain) -> bool:
        """Whether it may hold what is not the log's."""
        return self.loose or self.strays(log)

    def given_up(self, told: int, log: Chain, slides: bool) -> None:
        """Nothing that is under way is wanted any more, but the cloud may have gone on with it.

        Rows that were sent ahead may have come, and are worth asking for.

        Args:
            told: positions up to the last token that a stream gave, 0 for no stream; the log has the first of them.
            slides: whether the cloud may have let go of where it would be cut.
        """
        self.check(log)
        self.agreed = max(self.agreed, min(told, self.committed, len(log)))
        self.loose = self.ahead <= self.committed and not slides
        self.opened = self.opened and self.loose

    def ready(self, limit: int, log: Chain) -> bool:
        """Whether rows may be sent from `ahead` on, which is at most `limit`."""
        return self.opened and self.committed == self.agreed <= self.ahead <= limit and not self.unsure(log)

    def check(self, log: Chain) -> bool:
        """Compares what the cloud holds with the log, which may have grown; False when it is not a prefix of it."""
        if self.committed <= len(log) and log.at(self.committed) == self.head:
            self.agreed = self.committed
            return True
        return False

    def opening(self, model_id: str, kv_format: str, window: int, log: Chain, numerics: str) -> Open:
        """The message that opens the lane or takes it up again, and asks for what the cloud has of the log.

        Args:
            numerics: of what makes hidden states, empty where others need not make the same.
        """
        self.epoch += 1
        self.opened = self.loose = self.turned = False
        self.streamed, self.expects = 0, None
        message = Open(self.session, self.alias, self.epoch, model_id, self.enter, kv_format, window)
        if self.enter and numerics:
            message.source = f"{numerics}/{self.codec}"
        if message.source or not self.enter:
            message.prefixes = log.names(min(self.limit, len(log), MAX_PREFIXES // NAME_BYTES * BLOCK))
        return message

    def cutting(self, length: int) -> Truncate:
        """The message that makes the cloud forget positions from `length` on."""
        self.epoch += 1
        self.streamed, self.expects = 0, None
        return Truncate(self.alias, self.epoch, length)

    def cut(self, length: int, log: Chain) -> None:
        """The cloud is about to hold what of the log's first `length` positions it is known to hold or was sent."""
        self.check(log)
        self.agreed = min(self.agreed, length)
        self.stands(self.agreed, log.at(self.agreed))
        self.ahead, self._tail = length, log.at(length)
        self.expects, self.loose = (length, self._tail), False

    def was_cut(self, length: int, committed: int, head: bytes) -> bool:
        """Takes in the answer to a cut; False if the cloud holds something else than the cut should have left."""
        if self.expects is None or self.expects[0] != length:
            return True  # of another cut: a later answer tells
        expected, self.expects = self.expects, None
        if (committed, head) != expected:
            return False
        if self.committed < length <= self.ahead:  # what was sent ahead has come
            self.committed = self.agreed = length
            self.head = head
        return True

    def told(self, committed: int, head: bytes, log: Chain) -> bool:
        """Takes in what the cloud says that it holds; False when that is not a prefix of the log."""
        self.stands(committed, head)
        self.sent = max(self.sent, committed)
        self.agreed = min(self.agreed, committed)
        return self.check(log)

    def streamed_to(self, committed: int, head: bytes) -> None:
        """Takes in how far a stream has come, whose tokens the log need not have yet."""
        self.stands(committed, head)
        self.sent = max(self.sent, committed)

    def edited(self, length: int, log: Chain) -> None:
        """The log is about to be cut back to `length` on the device."""
        self.check(log)
        self.turned = self.turned or self.agreed - length >= BLOCK
        self.agreed = min(self.agreed, length)

    def asks(self, log: Chain) -> bool:
        """Whether the cloud, that is about to be cut back, may well have more of the log than that by others."""
        return self.turned and min(self.limit, len(log)) - self.ahead >= _WORTH_ASKING

    def moved(self, enter: int, codec: str) -> None:
        """Rows enter elsewhere or travel otherwise from now on, which empties the session."""
        if enter == self.enter:  # the same Open would take up what is there
            self.renew()
        self.enter, self.codec, self.opened, self.loose, self.agreed = enter, codec, False, False, 0
        self.stands(0, ROOT)
