"""Sliding windows: what is seen, what is let go, what can be taken back, and sinks that stay in sight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.part import KV_BLOCK, KV_SLACK, Rows, Want
from isthmus.protocol.errors import EngineError, OutOfBlocks
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
WINDOW = 21


@native
@pytest.mark.parametrize("steps", [[1] * 150, [150], [50, 1, 1, 60, 38], [149, 1]], ids=len)
def test_a_window_is_the_mask_from_the_start(steps: list[int]) -> None:
    """Against the same weights with that window in every layer, where no block is let go."""
    config, text = random_config(windows=(0, 9, 0)), some_tokens(150)
    reference = open_part(RandomModel("q4", replace(config, windows=(WINDOW, 9, WINDOW))))
    expected, hidden, _ = run_tokens(reference, reference.open(), text, [150])
    part = open_part(RandomModel("q4", config), threads=2)
    sequence = part.open(window=WINDOW, sinks=0)
    found, states, _ = run_tokens(part, sequence, text, steps)
    assert found.tobytes() == expected.tobytes() and states.tobytes() == hidden.tobytes()
    full = part.open()
    other, _, _ = run_tokens(part, full, text, [150])
    assert other.tobytes() != expected.tobytes()  # so the window does something


@native
@pytest.mark.parametrize("sinks", [0, 17])
def test_a_window_runs_forever_in_few_blocks(sinks: int) -> None:
    model = RandomModel("q4", random_config(n_layers=1))
    room = 96 + -(-sinks // KV_BLOCK) * KV_BLOCK
    part, text = open_part(model, max_tokens=room), some_tokens(700)
    sequence = part.open(window=WINDOW, sinks=sinks)
    with pytest.raises(OutOfBlocks):
        part.step(Rows().tokens(sequence, 0, text[: room + 1]))
    assert sequence.length == 0 and part.free_tokens == room
    for at in (*range(100), *range(100, 380, 20)):
        part.step(Rows().tokens(sequence, at, text[at : at + (20 if at >= 100 else 1)], want=Want.NONE))
    assert sequence.length == 380
    held = 96 - part.free_tokens
    assert held <= WINDOW + KV_SLACK + 20 + 2 * KV_BLOCK
    wide = open_part(model, max_tokens=304 + room)  # whose piece of 256 rows and window fit, but not all positions
    long = wide.open(window=WINDOW, sinks=sinks)
    wide.step(Rows().tokens(long, 0, text, want=Want.NONE))
    assert long.length == 700 and wide.free_tokens >= 400 - 256 - WINDOW - KV_SLACK - 2 * KV_BLOCK
    fork = long.fork()
    long.close()
    fork.close()
    sequence.close()
    assert wide.free_tokens == 304 + room and part.free_tokens == room


@native
def test_a_window_can_be_taken_back_a_little() -> None:
    config, text = random_config(windows=(WINDOW,) * 3), some_tokens(200)
    reference = open_part(RandomModel("q4", config))
    expected, _, _ = run_tokens(reference, reference.open(), text, [200])
    part = open_part(RandomModel("q4", replace(config, windows=())))
    for length in range(100, 130):
        sequence = part.open(window=WINDOW, sinks=0)
        run_tokens(part, sequence, text[:length], [1] * length)
        sequence.truncate(length - KV_SLACK)
        found, _, _ = run_tokens(part, sequence, text[length - KV_SLACK :], [200 - length + KV_SLACK])
        assert found.tobytes() == expected[length - KV_SLACK :].tobytes()
        for back in (0, 35):
            if back:
                with pytest.raises(EngineError, match="go back"):
                    sequence.truncate(back)
            with pytest.raises(EngineError, match="behind the window"):
                part.step(Rows().tokens(sequence, back, [1]))
        assert sequence.length == 200
        sequence.truncate(0)
        assert part.free_tokens == 1024
        sequence.close()


@native
def test_several_spans_of_a_windowed_sequence() -> None:
    """The second span of a call must not let go of what the first one still sees."""
    config, text = random_config(windows=(WINDOW,) * 3), some_tokens(240)
    reference = open_part(RandomModel("q4", config))
    expected, _, _ = run_tokens(reference, reference.open(), text, [240])
    part = open_part(RandomModel("q4", replace(config, windows=())))
    sequence = part.open(window=WINDOW, sinks=0)
    rows = Rows()
    for at in range(0, 240, 60):
        rows.tokens(sequence, at, text[at : at + 60], want=Want.LOGITS, want_all=True)
    assert part.step(rows).logits.tobytes() == expected.tobytes()
    for window, sinks in ((-1, 0), (0, 16), (8, -16)):
        with pytest.raises(EngineError, match="window"):
            part.open(window=window, sinks=sinks)


@native
@pytest.mark.parametrize("format", ["f16", "f32"])
def test_sinks_are_seen_as_if_they_stood_before_the_window(format: str) -> None:
    """With one layer a row sees what it would see in a text of the sinks and its window alone."""
    model, text = RandomModel("f32", random_config(n_layers=1)), some_tokens(300)
    part = open_part(model, format=format)
    sequence = part.open(window=40, sinks=20)  # two blocks
    found, _, _ = run_tokens(part, sequence, text, [300])
    for position in (30, 70, 80, 95, 111, 112, 250, 299):
        start = max((position + 1 - 40) // KV_BLOCK * KV_BLOCK, 2 * KV_BLOCK)
        seen = text[: 2 * KV_BLOCK] + text[start : position + 1] if position >= 2 * KV_BLOCK else text[: position + 1]
        short = part.open()
        expected, _, _ = run_tokens(part, short, seen, [len(seen)])
        short.close()
        error = np.abs(found[position] - expected[-1]).max() / np.abs(expected[-1]).max()
        assert error < (1e-5 if format == "f32" else 2e-3), position
    plain = part.open(window=40, sinks=0)
    assert np.abs(run_tokens(part, plain, text, [300])[0][-1] - found[-1]).max() > 0.1  # so the sinks do something


@native
def test_sinks_hold_for_any_chunking_and_thread_count() -> None:
    model, text = RandomModel("q4", random_config(windows=(0, 30, 0))), some_tokens(260)
    expected = None
    for threads in (1, 2):
        part = open_part(model, threads=threads)
        for steps in ([1] * 260, [260], [7] * 37 + [1], [100, 1, 1, 100, 58]):
            sequence = part.open(window=WINDOW)  # the back end's own 16 sinks
            logits, hidden, samples = run_tokens(part, sequence, text, steps)
            got = logits.tobytes(), hidden.tobytes(), samples
            expected = expected or got
            assert got == expected
            sequence.close()
    wide = part.open(window=260)
    assert run_tokens(part, wide, text, [260])[0].tobytes() == run_tokens(part, part.open(), text, [260])[0].tobytes()


@native
def test_sinks_survive_forks_and_rollbacks() -> None:
    model, text = RandomModel("q4"), some_tokens(260)
    part = open_part(model)
    whole = part.open(window=WINDOW)
    expected, _, _ = run_tokens(part, whole, text, [260])
    sequence = part.open(window=WINDOW)
    run_tokens(part, sequence, text[:200], [100, 100])
    fork = sequence.fork()
    sequence.truncate(200 - KV_SLACK)
    with pytest.raises(EngineError, match="go back"):
        sequence.truncate(20)
    again, _, _ = run_tokens(part, sequence, text[200 - KV_SLACK :], [60, KV_SLACK])
    assert again.tobytes() == expected[200 - KV_SLACK :].tobytes()
    sequence.close()
    assert run_tokens(part, fork, text[200:], [60])[0].tobytes() == expected[200:].tobytes()
    for left in (whole, fork):
        left.close()
    assert part.free_tokens == 1024
