"""The chain of prefix hashes."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.chain import ROOT, Chain, extend

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_hash_is_blake2b_of_hash_and_token() -> None:
    expected = blake2b(bytes(16) + (258).to_bytes(4, "little"), digest_size=16).digest()
    assert extend(ROOT, 258) == expected
    assert Chain([258]).head == expected
    # Golden: the wire format of every later version.
    assert Chain([1, 2, 3]).head.hex() == "23780f99a49b4f2fd47926c6994b29cb"


@given(TOKENS, TOKENS, st.integers(0, 40))
def test_a_prefix_has_one_hash_whatever_came_between(first: list[int], second: list[int], cut: int) -> None:
    chain = Chain(first)
    cut = min(cut, len(first))
    chain.truncate(cut)
    chain.extend(second)
    fresh = Chain(first[:cut] + second)
    assert chain.tokens == fresh.tokens
    assert len(chain) == len(fresh)
    assert [chain.at(i) for i in range(len(chain) + 1)] == [fresh.at(i) for i in range(len(fresh) + 1)]


def test_order_and_length_count() -> None:
    assert Chain([1, 2]).head != Chain([2, 1]).head
    assert Chain([0]).head != Chain([]).head
