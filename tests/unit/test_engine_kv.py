"""Paged KV: sharing, copying on write, running out, and sliding windows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.binding import cpu_names
from isthmus.engine.kv import BlockTable, Forecast, KvPool, block_bytes
from isthmus.engine.native_part import chain
from isthmus.engine.native_sequence import NativeSequence
from isthmus.engine.part import KV_BLOCK, KvConfig, Rows, Want
from isthmus.protocol.errors import EngineError, OutOfBlocks
from tests.native_tools import kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
WINDOW = 21


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel("q4")


def small_pool(blocks: int) -> KvPool:
    return KvPool(random_config(), 1, KvConfig("f16", blocks * KV_BLOCK))


def test_blocks_are_as_large_as_the_layout_says() -> None:
    config = random_config(head_dim=20, n_kv_heads=2)  # 20 is padded to 32
    assert block_bytes(config, 3, KvConfig("f16")) == 3 * 2 * 2 * 16 * 32 * 2
    assert block_bytes(config, 3, KvConfig("f32")) == 3 * 2 * 2 * 16 * 32 * 4
    pool = KvPool(config, 3, KvConfig("f16", 33))
    assert pool.n_blocks == pool.free_blocks == 3
    assert pool.memory.ctypes.data % 64 == 0 and pool.memory.shape == (3, block_bytes(config, 3, KvConfig("f16")))
    with pytest.raises(EngineError, match="int8"):
        KvPool(config, 3, KvConfig("int8"))
    with pytest.raises(EngineError, match="at least one"):
        KvPool(config, 3, KvConfig("f16", 0))


def test_the_table_copies_only_what_it_writes() -> None:
    pool = small_pool(8)
    a = BlockTable(pool, 1)
    a.writable(0, 40)
    assert a.count == 3 and pool.free_blocks == 5 and len(set(a.blocks[:3].tolist())) == 3
    pool.memory[a.blocks[:3]] = np.array([[1], [2], [3]], np.uint8)
    b = a.fork()
    assert pool.free_blocks == 5 and b.blocks[:3].tolist() == a.blocks[:3].tolist()
    b.writable(20, 50)
    assert pool.free_blocks == 2  # two copies, one new
    assert b.blocks[0] == a.blocks[0] and set(b.blocks[1:4].tolist()).isdisjoint(a.blocks[:3].tolist())
    assert [int(pool.memory[i, 0]) for i in b.blocks[:3]] == [1, 2, 3]
    before = a.blocks.tolist()
    a.writable(20, 40)
    assert a.blocks.tolist() == before  # the last user writes in place
    a.truncate(0)
    assert pool.free_blocks == 4
    b.truncate(0)
    assert pool.free_blocks == 8 and not any(pool.users)


def test_the_forecast_is_what_happens() -> None:
    """Random tables, forks, windows and truncations: foreseen and real free blocks agree at every step."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        pool = small_pool(40)
        tables = [BlockTable(pool)]
        for _ in range(12):
            action = rng.integers(4)
            if action == 0 and len(tables) < 5:
                tables.append(tables[int(rng.integers(len(tables)))].fork())
            elif action == 1:
                table = tables[int(rng.integers(len(tables)))]
                table.truncate(int(rng.integers(table.dropped * 16, table.count * 16 + 1)))
            else:
                forecast = Forecast(pool)
                plan = []
                for table in (tables[int(i)] for i in rng.permutation(len(tables))[:3]):
                    start = int(rng.integers(table.dropped * 16, table.count * 16 + 1))
                    plan.append((table, start, start + int(rng.integers(1, 70)), start - int(rng.integers(0, 60))))
                    forecast.take(*plan[-1])
                if forecast.least < 0:
                    continue
                least = pool.free_blocks
                for table, start, end, keep in plan:
                    table.drop_before(keep)
                    table.writable(start, end)
                    least = min(least, pool.free_blocks)
                assert forecast.least == least
        for table in tables:
            table.truncate(0)
        assert pool.free_blocks == 40 and not any(pool.users)


@native
def test_a_fork_shares_until_one_writes(model: RandomModel) -> None:
    part, text = open_part(model), some_tokens(60)
    trunk = part.open()
    expected, _, _ = run_tokens(part, trunk, text, [60])
    trunk.truncate(40)
    free = part.free_tokens
    branch, third = trunk.fork(), trunk.fork()
    assert part.free_tokens == free  # nothing was copied
    other = some_tokens(20, 5)
    run_tokens(part, branch, other, [1, 19])
    assert part.free_tokens == free - 2 * KV_BLOCK  # the half-filled block, and one behind it
    assert trunk.tables[0].blocks[:2].tolist() == branch.tables[0].blocks[:2].tolist()
    again, _, _ = run_tokens(part, trunk, text[40:], [20])
    assert again.tobytes() == expected[40:].tobytes()
    alone = part.open()
    run_tokens(part, alone, text[:40] + other, [60])
    assert kv_bytes(alone) == kv_bytes(branch)
    memory = kv_bytes(third)
    trunk.close()
    branch.close()
    assert kv_bytes(third) == memory
    last, _, _ = run_tokens(part, third, text[40:], [20])
    assert last.tobytes() == expected[40:].tobytes()
    third.close()
    alone.close()
    assert part.free_tokens == 1024


@native
def test_forks_write_in_one_step(model: RandomModel) -> None:
    part, text = open_part(model), some_tokens(21)
    trunk = part.open()
    part.step(Rows().tokens(trunk, 0, text[:20], want=Want.NONE))
    branches = [trunk.fork() for _ in range(3)]
    rows = Rows()
    for i, branch in enumerate(branches):
        rows.tokens(branch, 20, [i], want=Want.LOGITS)
    logits = part.step(rows).logits
    for i, branch in enumerate(branches):
        alone = part.open()
        found, _, _ = run_tokens(part, alone, [*text[:20], i], [21])
        assert found[-1].tobytes() == logits[i].tobytes() and kv_bytes(alone) == kv_bytes(branch)
        alone.close()


@native
@pytest.mark.parametrize("pieces", [1, 3])
def test_running_out_changes_nothing(model: RandomModel, pieces: int) -> None:
    """In one part, and in a chain whose pools differ."""
    text = some_tokens(400)
    if pieces == 1:
        part, room = open_part(model, max_tokens=320), 320
    else:
        part = chain([open_part(model, i, i + 1, max_tokens=tokens) for i, tokens in enumerate((480, 320, 400))])
        room = 320
    assert part.free_tokens == room
    a, b = part.open(), part.open()
    logits, _, _ = run_tokens(part, a, text[:64], [64])
    run_tokens(part, b, text[:32], [32])
    free = [layers.pool.free_blocks for layers in part._layers]
    memory = kv_bytes(a), kv_bytes(b)
    fork = a.fork()
    attempts = [
        Rows().tokens(a, 64, text[64:300]),
        Rows().tokens(a, 64, text[64:400]),  # more than one native call
        Rows().tokens(a, 64, text[64:200]).tokens(b, 32, text[32:200]),
        Rows().tokens(fork, 0, text[:64]).tokens(a, 64, text[64:250]),  # copies need room too
    ]
    for rows in attempts:
        with pytest.raises(OutOfBlocks, match="are free"):
            part.step(rows)
        assert (a.length, b.length, fork.length) == (64, 32, 64)
        assert [layers.pool.free_blocks for layers in part._layers] == free
        assert (kv_bytes(a), kv_bytes(b)) == memory
    fork.close()
    part.step(Rows().tokens(a, 64, text[64:288], want=Want.NONE))  # exactly what is left
    assert part.free_tokens == 0
    free = [layers.pool.free_blocks for layers in part._layers]
    for sequence in (a, b):
        with pytest.raises(OutOfBlocks):
            part.step(Rows().tokens(sequence, sequence.length, [1]))
    assert [layers.pool.free_blocks for layers in part._layers] == free
    b.close()
    part.step(Rows().tokens(a, 288, [1]))
    a.truncate(0)
    again, _, _ = run_tokens(part, a, text[:64], [64])
    assert again.tobytes() == logits.tobytes()


@native
def test_spans_that_share_a_block_need_it_once(model: RandomModel) -> None:
    part = open_part(model, max_tokens=16)
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, [1, 2], want=Want.NONE).tokens(sequence, 2, [3]))
    assert sequence.length == 3 and part.free_tokens == 0


@native
def test_a_failed_step_gives_its_blocks_back(model: RandomModel) -> None:
    part = open_part(model)
    sequence = part.open()
    hidden = np.zeros((300, model.config.d_model), np.float32)
    hidden[299] = np.nan
    for n in (100, 300):
        with pytest.raises(EngineError, match="not finite"):
            part.step(Rows().hidden(sequence, 0, hidden[-n:], enter=1))
        assert sequence.length == 0 and part.free_tokens == 1024


@native
@pytest.mark.parametrize("pieces", [1, 3])
def test_lent_blocks_outlive_their_sequence(model: RandomModel, pieces: int) -> None:
    part = chain([open_part(model, i, i + 1) for i in range(3)]) if pieces == 3 else open_part(model)
    text, free = some_tokens(60), part.free_tokens
    first = part.open()
    expected, _, _ = run_tokens(part, first, text, [60])
    blocks = [first.lend(index) for index in range(3)]
    assert all(block.in_use for block in blocks) and part.free_tokens == free - 4 * KV_BLOCK
    second = part.open()
    second.adopt(blocks[:2], 0)
    assert second.length == 32 and part.free_tokens == free - 4 * KV_BLOCK
    found, _, _ = run_tokens(part, second, text[32:], [5, 23])
    assert found.tobytes() == expected[32:].tobytes() and kv_bytes(second) == kv_bytes(first)
    memory = kv_bytes(second)
    first.truncate(10)  # and goes on elsewhere, in a block that others have
    run_tokens(part, first, some_tokens(20, 9), [20])
    first.close()
    assert kv_bytes(second) == memory
    second.close()
    assert not any(block.in_use for block in blocks) and part.free_tokens == free - 3 * KV_BLOCK
    third = part.open()
    third.adopt(blocks, 0)
    found, _, _ = run_tokens(part, third, text[48:], [12])
    assert found.tobytes() == expected[48:].tobytes()
    third.close()
    for block in blocks:
        block.close()
        block.close()
    assert part.free_tokens == free


@native
def test_a_block_that_was_lent_is_copied_before_it_is_written(model: RandomModel) -> None:
    """Also where the sequence knew that it may write, without a look at its tables."""
    part, text = open_part(model), some_tokens(48)
    sequence = part.open()
    run_tokens(part, sequence, text[:40], [40])
    block = sequence.lend(1)
    before = block.data()
    sequence.truncate(20)
    run_tokens(part, sequence, some_tokens(20, 9), [1] * 20)
    assert block.data() == before
    other = part.open()
    run_tokens(part, other, text[:16], [16])
    assert other.lend(0).data() == sequence.lend(0).data()


@native
@pytest.mark.parametrize("enter", [0, 2])
def test_a_block_comes_back_bit_for_bit(model: RandomModel, enter: int) -> None:
    part, text = open_part(model), some_tokens(40)
    states = np.random.default_rng(1).standard_normal((40, model.config.d_model)).astype(np.float32)

    def step(sequence: NativeSequence, start: int) -> NDArray[np.float32]:
        rows = Rows()
        if enter:
            rows.hidden(sequence, start, states[start:], enter=enter, want=Want.LOGITS, want_all=True)
        else:
            rows.tokens(sequence, start, text[start:], want=Want.LOGITS, want_all=True)
        return part.step(rows).logits

    first = part.open()
    expected = step(first, 0)
    data = [first.lend(index).data(enter) for index in range(2)]
    whole = len(first.lend(0).data())
    assert {len(one) for one in data} == {whole * (model.config.n_layers - enter) // model.config.n_layers}
    first.close()
    second = part.open()
    second.adopt([part.restore(one, enter) for one in data], enter)
    assert step(second, 32).tobytes() == expected[32:].tobytes()
    if enter:
        with pytest.raises(EngineError, match="hold 0: give the positions before it first"):
            part.step(Rows().tokens(second, second.length, [1]))  # the layers before it hold nothing
    with pytest.raises(EngineError, match="bytes"):
        part.restore(data[0][1:], enter)


@native
def test_blocks_are_refused_where_they_do_not_fit(model: RandomModel) -> None:
    part, other = open_part(model, max_tokens=64), open_part(model)
    sequence = part.open()
    run_tokens(part, sequence, some_tokens(20), [20])
    with pytest.raises(EngineError, match="block 1 of 20 positions"):
        sequence.lend(1)
    block = sequence.lend(0)
    with pytest.raises(EngineError, match="20 positions are held already"):
        sequence.adopt([block], 0)
    with pytest.raises(EngineError, match="another part"):
        other.open().adopt([block], 0)
    with pytest.raises(EngineError, match="layer 9"):
        part.open().adopt([block], 9)
    data = block.data()
    held = [part.restore(data), part.restore(data)]
    with pytest.raises(OutOfBlocks, match="full"):
        part.restore(data)
    held[0].close()
    held[0] = part.restore(data)
    block.close()
    with pytest.raises(EngineError, match="closed"):
        part.open().adopt([block], 0)
    with pytest.raises(EngineError, match="closed"):
        block.data()
    windowed = other.open(window=WINDOW)
    run_tokens(other, windowed, some_tokens(200), [20] * 10)
    with pytest.raises(EngineError, match="not held whole"):
        windowed.lend(3)  # let go
    assert windowed.lend(0).in_use  # a sink
