"""KV that sessions of one model leave behind, and that others begin with: blocks of 16 positions.

A block is named by the chain over all tokens up to its last one, within a root: whose it is and how it came about.
What tokens of one owner were computed to, its other sessions take without computing anything, and nobody else sees
that it is there. A block that no session uses stays until its memory is needed, or its time is up; what was used
longest ago goes first, and of one text its end before its beginning. A block lost is computed again, never an error.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from isthmus.cloud.root import Root
from isthmus.cloud.session import Session
from isthmus.engine.part import KV_BLOCK, KvBlock
from isthmus.protocol.chain import BLOCK, NAME_BYTES, Chain

assert KV_BLOCK == BLOCK


@dataclass(slots=True)
class _Entry:
    """A block.

    Attributes:
        tokens: of its positions.
        head: chain over all tokens up to the last of them.
        used_s: when a session last used it.
    """

    block: KvBlock
    tokens: list[int]
    head: bytes
    used_s: float


class Context:
    """See the module. No clock: it takes for now what `refresh` was told last.

    Attributes:
        asked_tokens, found_tokens: that sessions wanted to begin with, and that they began with.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Root, bytes], _Entry] = OrderedDict()  # what goes first comes first
        self._now_s = 0.0
        self.asked_tokens = self.found_tokens = 0

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._entries)

    @property
    def spare_tokens(self) -> int:
        """Positions of blocks that no session uses: memory that can be had."""
        return KV_BLOCK * sum(not entry.block.in_use for entry in self._entries.values())

    def begin(self, session: Session, root: Root, prefixes: bytes) -> None:
        """Gives an empty session what is held of a text; what it computes from now on is kept.

        Args:
            prefixes: see `protocol.chain.Chain.names`.
        """
        session.root, names = root, [prefixes[at : at + NAME_BYTES] for at in range(0, len(prefixes), NAME_BYTES)]
        if session.window:
            del names[session.window // BLOCK :]  # positions beyond it do not see the first ones
        found, chain = list[_Entry](), Chain()
        for name in names:
            entry = self._entries.get((root, name))
            if entry is None:
                break
            chain.extend(entry.tokens)
            if chain.head != entry.head:  # another text whose hash begins alike
                chain.truncate(BLOCK * len(found))
                break
            found.append(entry)
        self.asked_tokens += BLOCK * len(names)
        self.found_tokens += BLOCK * len(found)
        if found:
            session.begin(chain, [entry.block for entry in found])
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
            if (root, head[:NAME_BYTES]) not in self._entries:
                tokens = session.chain.tokens[index * BLOCK : (index + 1) * BLOCK]
                block = session.sequence.lend(index)
                self._entries[root, head[:NAME_BYTES]] = _Entry(block, tokens, head, self._now_s)
        session.kept = max(session.kept, end)

    def touch(self, session: Session) -> None:
        """Its blocks were used just now."""
        for index in range(session.kept, 0, -1):  # the beginning of a text is kept longest
            assert session.root is not None
            key = session.root, session.chain.at(index * BLOCK)[:NAME_BYTES]
            if (entry := self._entries.get(key)) is not None:
                entry.used_s = self._now_s
                self._entries.move_to_end(key)

    def reclaim(self, tokens: int) -> int:
        """Frees memory for so many positions, or what there is; for how many it did."""
        freed = 0
        for key, entry in list(self._entries.items()):
            if freed >= tokens:
                break
            if not entry.block.in_use:
                self._drop(key)
                freed += KV_BLOCK
        return freed

    def refresh(self, now_s: float, keep_s: float) -> None:
        """Drops what no session has used for so long; to be called every second or so."""
        self._now_s = now_s
        for key, entry in list(self._entries.items()):
            if entry.block.in_use:
                entry.used_s = now_s
            elif now_s - entry.used_s > keep_s:
                self._drop(key)

    def expel(self, principals: set[str]) -> None:
        """Drops what belongs to others than these."""
        for key in [key for key in self._entries if key[0].principal not in principals]:
            self._drop(key)

    def close(self) -> None:
        """Drops everything."""
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: tuple[Root, bytes]) -> None:
        self._entries.pop(key).block.close()
