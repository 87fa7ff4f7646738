"""KV that sessions of one model leave behind, and that others begin with: blocks of 16 positions.

A block is named by the chain over all tokens up to its last one, within a root: whose it is and how it came about.
What tokens of one owner were computed to, its other sessions take without computing anything, and nobody else sees
that it is there. Texts that are pinned are everybody's, and stay. Any other block that no session uses stays until its
memory is needed, or its time is up; what was used longest ago goes first, and of one text its end before its
beginning: to disk where there is a place for it, and from there back, bit for bit. A block lost is computed again,
never an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from isthmus.cloud.root import EVERYBODY, Root
from isthmus.cloud.session import Session
from isthmus.cloud.spill import Slot, Spill
from isthmus.engine.part import KV_BLOCK, KvBlock, Part, Rows, Want
from isthmus.protocol.chain import BLOCK, NAME_BYTES, Chain

assert KV_BLOCK == BLOCK


@dataclass(slots=True)
class _Entry:
    """A block.

    Attributes:
        block: in memory, None where it is not.
        slot: on disk, None where it is not.
        tokens: of its positions.
        head: chain over all tokens up to the last of them.
        enter: layer from which on it is filled.
        used_s: when a session last used it.
        pinned: it stays.
    """

    block: KvBlock | None
    slot: Slot | None
    tokens: list[int]
    head: bytes
    enter: int
    used_s: float
    pinned: bool = False

    @property
    def spare(self) -> bool:
        """Whether it takes memory that no session needs."""
        return self.block is not None and not self.pinned and not self.block.in_use


_Key = tuple[Root, bytes]


@dataclass(slots=True)
class Prefix:
    """What is held of a text that a session wants to begin with.

    Attributes:
        asked_tokens: that it wants.
        chain: over the tokens that are held.
        entries: their blocks.
    """

    root: Root
    asked_tokens: int
    chain: Chain
    entries: list[_Entry]


class Context:
    """See the module. No clock: it takes for now what `refresh` was told last.

    Args:
        part: whose KV it is.

    Attributes:
        spill: where blocks go whose memory is needed; None for nowhere.
        asked_tokens, found_tokens: that sessions wanted to begin with, and that they began with.
        pinned_tokens: positions that stay.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # what goes first comes first
        self._resident: OrderedDict[_Key, _Entry] = OrderedDict()  # those in memory, of perhaps many more; as they go
        self._now_s = 0.0
        self.spill: Spill | None = None
        self.asked_tokens = self.found_tokens = self.pinned_tokens = 0

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._entries)

    @property
    def spare_tokens(self) -> int:
        """Positions of blocks that no session uses: memory that can be had."""
        return KV_BLOCK * self._spare()

    def pin(self, tokens: list[int]) -> int:
        """Computes a text whose whole blocks are everybody's from now on, and stay; how many tokens those have.

        Raises:
            OutOfBlocks: there is no memory for it.
            EngineError: a token is none of the model's.
        """
        sequence, chain = self._part.open(), Chain(tokens)
        try:
            self._part.step(Rows().tokens(sequence, 0, tokens, want=Want.NONE))
            for index in range(len(tokens) // BLOCK):
                head = chain.at((index + 1) * BLOCK)
                key = EVERYBODY, head[:NAME_BYTES]
                if key not in self._entries:
                    of = tokens[index * BLOCK : (index + 1) * BLOCK]
                    self._add(key, _Entry(sequence.lend(index), None, of, head, 0, self._now_s, pinned=True))
                    self.pinned_tokens += BLOCK
        finally:
            sequence.close()
        return len(tokens) // BLOCK * BLOCK

    def find(self, root: Root, prefixes: bytes, window: int) -> Prefix:
        """What is held of a text, in memory or on disk.

        Args:
            prefixes: see `protocol.chain.Chain.names`.
            window: attention window of the session, 0 for none.
        """
        names = [prefixes[at : at + NAME_BYTES] for at in range(0, len(prefixes), NAME_BYTES)]
        if window:
            del names[window // BLOCK :]  # positions beyond it do not see the first ones
        found = Prefix(root, BLOCK * len(names), Chain(), [])
        for name in names:
            entry = self._entries.get(self._key(root, name))
            if entry is None:
                break
            found.chain.extend(entry.tokens)
            if found.chain.head != entry.head:  # another text whose hash begins alike
                break
            found.entries.append(entry)
        return found

    def lacks(self, prefix: Prefix) -> bool:
        """Whether memory is missing for what of a prefix is on disk, even if all is taken that no session uses."""
        spare = self._spare() - sum(entry.spare for entry in prefix.entries)
        missing = sum(entry.block is None for entry in prefix.entries)
        return missing > spare + self._part.free_tokens // BLOCK

    def begin(self, session: Session, prefix: Prefix) -> None:
        """Gives an empty session what was found, as far as there is memory; what it computes from now on is kept."""
        session.root, blocks = prefix.root, list[KvBlock]()
        missing = BLOCK * sum(entry.block is None for entry in prefix.entries)
        self.reclaim(missing - self._part.free_tokens, {id(entry) for entry in prefix.entries})
        for entry in prefix.entries:
            block = entry.block or self._restored(self._key(prefix.root, entry.head[:NAME_BYTES]), entry)
            if block is None:
                break
            blocks.append(block)
        prefix.chain.truncate(BLOCK * len(blocks))
        self.asked_tokens += prefix.asked_tokens
        self.found_tokens += BLOCK * len(blocks)
        if blocks:
            session.begin(prefix.chain, blocks)
            self.touch(session)

    def keep(self, session: Session) -> None:
        """Keeps the blocks that a session filled since the last time."""
        root, end = session.root, session.committed // BLOCK
        if session.window:
            end = min(end, session.window // BLOCK)
        if root is None:
            return
        for index in range(session.kept, end):
            head = session.chain.at((index + 1) * BLOCK)
            key = self._key(root, head[:NAME_BYTES])
            if (entry := self._entries.get(key)) is None:
                tokens = session.chain.tokens[index * BLOCK : (index + 1) * BLOCK]
                block = session.sequence.lend(index)
                self._add(key, _Entry(block, None, tokens, head, root.enter, self._now_s))
            elif entry.block is None and entry.head == head:
                entry.block = session.sequence.lend(index)
                self._resident[key] = entry
        session.kept = max(session.kept, end)

    def touch(self, session: Session) -> None:
        """Its blocks were used just now."""
        if session.root is None:
            return
        for index in range(session.kept, 0, -1):  # the beginning of a text is kept longest
            key = self._key(session.root, session.chain.at(index * BLOCK)[:NAME_BYTES])
            if (entry := self._entries.get(key)) is not None:
                entry.used_s = self._now_s
                self._entries.move_to_end(key)
                if entry.block is not None:
                    self._resident.move_to_end(key)

    def reclaim(self, tokens: int, but: Collection[int] = ()) -> int:
        """Frees memory for so many positions, or what there is; for how many it did.

        Args:
            but: ids of entries that stay.
        """
        freed = 0
        for key, entry in list(self._resident.items()) if tokens > 0 else ():
            if freed >= tokens:
                break
            if entry.spare and id(entry) not in but:
                self._put_away(key, entry)
                freed += KV_BLOCK
        return freed

    def refresh(self, now_s: float, keep_s: float) -> None:
        """Drops what no session has used for so long; to be called every second or so."""
        self._now_s = now_s
        for key, entry in list(self._entries.items()):
            if entry.block is not None and entry.block.in_use:
                entry.used_s = now_s
            elif now_s - entry.used_s > keep_s and not entry.pinned:
                self._drop(key)

    def expel(self, principals: set[str]) -> None:
        """Drops what belongs to others than these."""
        for key in [key for key in self._entries if key[0] != EVERYBODY and key[0].principal not in principals]:
            self._drop(key)

    def close(self) -> None:
        """Drops everything."""
        for key in list(self._entries):
            self._drop(key)
        if self.spill is not None:
            self.spill.close()

    def _spare(self) -> int:
        return sum(entry.spare for entry in self._resident.values())

    def _add(self, key: _Key, entry: _Entry) -> None:
        self._entries[key] = self._resident[key] = entry

    def _key(self, root: Root, name: bytes) -> _Key:
        """Where a block of that name is, or would be."""
        return (EVERYBODY, name) if not root.enter and (EVERYBODY, name) in self._entries else (root, name)

    def _restored(self, key: _Key, entry: _Entry) -> KvBlock | None:
        """A block from disk, in memory again; None where it cannot be had."""
        if self.spill is None or entry.slot is None or self._part.free_tokens < KV_BLOCK:
            return None
        data = self.spill.get(entry.slot)
        if data is None:
            self._drop(key)
            return None
        entry.block = self._part.restore(data, entry.enter)
        self._resident[key] = entry
        return entry.block

    def _put_away(self, key: _Key, entry: _Entry) -> None:
        """Takes a block's memory; without a place on disk it is forgotten."""
        assert entry.block is not None
        if self.spill is not None and entry.slot is None:
            if self.spill.full:
                self._make_room()
            entry.slot = self.spill.put(entry.block.data(entry.enter))
        if entry.slot is None:
            self._drop(key)
        else:
            entry.block.close()
            entry.block = None
            del self._resident[key]

    def _make_room(self) -> None:
        """Gives up the slot of what was used longest ago."""
        for key, entry in self._entries.items():
            if entry.slot is not None:
                if entry.block is None:
                    self._drop(key)
                else:
                    self._give_slot(entry)
                break

    def _give_slot(self, entry: _Entry) -> None:
        if self.spill is not None and entry.slot is not None:
            self.spill.give(entry.slot)
            entry.slot = None

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        self._resident.pop(key, None)
        self._give_slot(entry)
        if entry.block is not None:
            entry.block.close()
