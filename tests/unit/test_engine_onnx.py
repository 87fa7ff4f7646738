from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.engine.onnx_graph import Builder, cells
from isthmus.engine.onnx_part import OnnxPart, open_onnx
from isthmus.engine.onnx_session import Session
from isthmus.engine.part import KvConfig, Rows, Want, WeightSource
from isthmus.engine.sampler import sample
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError, OutOfBlocks
from isthmus.quant.groups import QUANTIZABLE, dequantize, pack, quantize
from isthmus.quant.packed import PackedMatrix

pytest.importorskip("onnxruntime")

CONFIG = DecoderConfig(
    family="llama",
    n_layers=3,
    d_model=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=80,
    vocab_size=50,
    context_length=64,
    norm_eps=1e-5,
    rope_inv_freq=tuple(float(10000.0 ** (-i / 8)) for i in range(8)),
    tied=True,
)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def matrix(format: str, rows: int, cols: int, rng: np.random.Generator) -> PackedMatrix:
    """Random weights; the formats that only checkpoints have are packed from random codes."""
    if format in QUANTIZABLE:
        return quantize((rng.standard_normal((rows, cols)) * cols**-0.5).astype(np.float32), format)
    groups, bits = -(-cols // 32), 8 if format == "q8x" else 4
    scale = (rng.uniform(0.5, 1, (rows, groups * (2 if bits == 8 else 1))) * cols**-0.5 / 2**bits).astype(np.float32)
    codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    arrays: dict[str, NDArray[Any]] = {"codes": codes, "scales": scale * 4}
    return pack(format, rows, cols, arrays if bits == 8 else arrays | {"mins": -scale * 30})


class RandomSource:
    """A model of random weights in one format."""

    def __init__(self, format: str = "f32", config: DecoderConfig = CONFIG) -> None:
        rng, c = np.random.default_rng(0), config
        self.config = config
        heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        shapes = {"q": (heads, c.d_model), "k": (kv, c.d_model), "v": (kv, c.d_model), "o": (c.d_model, heads)}
        shapes |= {"gate": (c.d_ff, c.d_model), "up": (c.d_ff, c.d_model), "down": (c.d_model, c.d_ff)}
        self.layers: list[dict[str, PackedMatrix | NDArray[np.float32]]] = [
            {name: matrix(format, *shape, rng) for name, shape in shapes.items()}
            | {name: rng.uniform(0.5, 1.5, c.d_model).astype(np.float32) for name in ("attn_norm", "ffn_norm")}
            for _ in range(c.n_layers)
        ]
        self.embed = matrix("q8" if format.startswith(("q", "n")) else format, c.vocab_size, c.d_model, rng)

    def embedding(self) -> PackedMatrix:
        return self.embed

    def head(self) -> PackedMatrix:
        return self.embed

    def final_norm(self) -> NDArray[np.float32]:
        return np.ones(self.config.d_model, np.float32)

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        return self.layers[index]


def opened(
    source: RandomSource | None = None, start: int = 0, end: int = 3, *, max_tokens: int = 64, precision: str = "f32"
) -> OnnxPart:
    kv = KvConfig("f32", max_tokens)
    return open_onnx(source or RandomSource(), start, end, threads=1, kv=kv, precision=precision)


def all_logits(part: OnnxPart, tokens: list[int] = PROMPT) -> NDArray[np.float32]:
    sequence = part.open()
    logits = part.step(Rows().tokens(sequence, 0, tokens, want=Want.LOGITS, want_all=True)).logits
    sequence.close()
    return logits


FORMATS = ["f32", "f16", "bf16", "q8", "q8x", "q4", "q4m", "q4x", "n2", "n4", "n8"]


@pytest.mark.parametrize("format", FORMATS[3:])
@pytest.mark.parametrize("cols", [64, 40, 80])
def test_cells_lose_nothing(format: str, cols: int) -> None:
    packed = matrix(format, 24, cols, np.random.default_rng(1))
    c = cells(packed)
    w = (c.codes.astype(np.float64) - 2 ** (c.bits - 1)) * np.repeat(c.scales, c.block, axis=1)[:, :cols]
    if c.offsets is not None:
        w += np.repeat(c.offsets, 32, axis=1)[:, :cols]
    np.testing.assert_allclose(w, dequantize(packed), atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_q4_precision_runs_every_format(format: str) -> None:
    """Only the rounding of activations to 8 bits is between the two precisions."""
    source = RandomSource(format)
    exact, packed = all_logits(opened(source)), all_logits(opened(source, precision="q4"))
    error = np.linalg.norm(packed - exact) / np.linalg.norm(exact)
    assert error < (1e-2 if format in FORMATS[:3] else 0.05)  # the head is 8 bits wide in both
    quantized = format not in FORMATS[:3]
    assert (error > 1e-4) == quantized  # the packed products really ran packed


def test_q4_precision_with_padded_heads_and_mixed_formats() -> None:
    config = replace(CONFIG, head_dim=12, rope_inv_freq=CONFIG.rope_inv_freq[:6])
    source = RandomSource("q4", config)
    source.layers[1]["v"] = matrix("q8", 24, 48, np.random.default_rng(3))
    exact, packed = all_logits(opened(source)), all_logits(opened(source, precision="q4"))
    assert np.linalg.norm(packed - exact) / np.linalg.norm(exact) < 0.05


def test_models_are_valid_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    builder = Builder(RandomSource("q4m"), packed=True, weights={})
    model = onnx.load_model_from_string(builder.layers(0, 2, 0).model())
    assert [o.domain for o in model.opset_import] == ["", "com.microsoft"]
    assert [i.name for i in model.graph.input][:6] == ["hidden", "cos", "sin", "place", "last", "total"]
    attention = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    found = {a.name: onnx.helper.get_attribute_value(a) for a in attention.attribute}
    assert found == {"num_heads": 4, "kv_num_heads": 2, "local_window_size": -1, "scale": 0.25}
    shapes = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == 7}
    assert shapes["split.[64, 32, 32]"].tolist() == [64, 32, 32]
    codes = next(t for t in model.graph.initializer if t.name == "0.qkv.codes")
    assert list(codes.dims) == [128, 2, 16] and codes.data_location == onnx.TensorProto.EXTERNAL


def test_sampling_is_the_sampler_at_the_rows_position() -> None:
    part, sampling = opened(), Sampling(temperature=1.5, seed=9)
    out = part.step(
        Rows().tokens(part.open(), 0, PROMPT, want=Want.LOGITS | Want.SAMPLE, want_all=True, sampling=sampling)
    )
    assert out.tokens == [sample(row, sampling, position) for position, row in enumerate(out.logits)]


def test_nothing_wanted_gives_nothing() -> None:
    part = opened()
    out = part.step(Rows().tokens(part.open(), 0, PROMPT, want=Want.NONE))
    assert (out.tokens, out.hidden.shape, out.logits.shape) == ([], (0, 48), (0, 50))


def test_results_are_copies() -> None:
    part = opened()
    sequence = part.open()
    first = part.step(Rows().tokens(sequence, 0, PROMPT, want=Want.HIDDEN | Want.LOGITS))
    kept = first.hidden.copy(), first.logits.copy()
    part.step(Rows().tokens(sequence, 8, PROMPT, want=Want.HIDDEN | Want.LOGITS))
    assert (first.hidden == kept[0]).all() and (first.logits == kept[1]).all()


def test_going_back_overwrites() -> None:
    """A row before the sequence's end replaces what stood there."""
    part = opened()
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, [*PROMPT[:5], 40, 41, 42], want=Want.NONE))
    out = part.step(Rows().tokens(sequence, 5, PROMPT[5:], want=Want.LOGITS))
    np.testing.assert_allclose(out.logits[0], all_logits(part)[-1], atol=1e-5)


def test_blocks_are_counted() -> None:
    part = opened(max_tokens=60)
    assert part.free_tokens == 64
    one, two = part.open(), part.open()
    part.step(Rows().tokens(one, 0, [1] * 17, want=Want.NONE).tokens(two, 0, [1], want=Want.NONE))
    assert part.free_tokens == 16
    before = all_logits(part)
    with pytest.raises(OutOfBlocks, match="max_tokens"):
        part.step(Rows().tokens(two, 1, [2] * 3, want=Want.NONE).tokens(one, 17, [1] * 40, want=Want.NONE))
    assert (one.length, two.length) == (17, 1)
    with pytest.raises(OutOfBlocks):
        one.fork()
    one.truncate(3)
    fork = one.fork()
    assert (fork.length, part.free_tokens) == (3, 16)
    for sequence in (one, two, fork):
        sequence.close()
        sequence.close()
    assert part.free_tokens == 64
    assert (all_logits(part) == before).all()


def test_windowed_sequence_holds_a_bounded_number() -> None:
    part = opened(max_tokens=512)
    sequence = part.open(window=4)
    for at in range(0, 1000, 100):
        part.step(Rows().tokens(sequence, at, [7] * 100, want=Want.NONE))
    assert sequence.length == 1000
    assert part.free_tokens >= 512 - 256
    with pytest.raises(EngineError, match="window"):
        sequence.truncate(500)
    sequence.truncate(980)
    part.step(Rows().tokens(sequence, 980, [7], want=Want.NONE))
    sequence.truncate(0)
    assert part.free_tokens == 512
    out = part.step(Rows().tokens(sequence, 0, PROMPT[:4], want=Want.LOGITS, want_all=True))
    np.testing.assert_allclose(out.logits, all_logits(part)[:4], atol=1e-5)


def test_a_failing_step_commits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    part = opened()
    one, two = part.open(), part.open()
    part.step(Rows().tokens(one, 0, PROMPT, want=Want.NONE))
    run, calls = Session.run, []

    def failing(self: Session, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        run(self, *arguments)

    monkeypatch.setattr(Session, "run", failing)
    rows = Rows().tokens(one, 8, [1, 2], want=Want.NONE).tokens(two, 0, [1], want=Want.NONE)
    with pytest.raises(EngineError, match="out of memory"):
        part.step(rows)
    assert (one.length, two.length) == (8, 0)
    part.step(rows)
    assert (one.length, two.length) == (10, 1)


HIDDEN = np.zeros((2, 48), np.float32)
BAD_ROWS: dict[str, tuple[str, Callable[[OnnxPart, Any], Rows]]] = {
    "gap": ("position 9", lambda p, s: Rows().tokens(s, 9, [1])),
    "negative": ("position -1", lambda p, s: Rows().tokens(s, -1, [1])),
    "skipped layers": ("position 8", lambda p, s: Rows().tokens(s, 8, [1], leave=1, want=Want(0)).tokens(s, 9, [1])),
    "token": ("token 50", lambda p, s: Rows().tokens(s, 8, [1, 50])),
    "negative token": ("token -1", lambda p, s: Rows().tokens(s, 8, [-1])),
    "leave": (r"layers \[0, 4\)", lambda p, s: Rows().tokens(s, 8, [1], leave=4, want=Want.HIDDEN)),
    "backwards": (r"layers \[2, 1\)", lambda p, s: Rows().hidden(s, 8, HIDDEN, enter=2, leave=1, want=Want.HIDDEN)),
    "early logits": ("logits", lambda p, s: Rows().tokens(s, 8, [1], leave=2, want=Want.LOGITS)),
    "shape": (r"\[2, 40\]", lambda p, s: Rows().hidden(s, 8, HIDDEN[:, :40], enter=1)),
    "dtype": ("float64", lambda p, s: Rows().hidden(s, 8, HIDDEN.astype(np.float64), enter=1)),
    "not finite": ("not finite", lambda p, s: Rows().hidden(s, 8, HIDDEN * np.float32(np.nan), enter=1)),
    "no rows": ("no rows", lambda p, s: Rows().tokens(s, 8, [])),
    "foreign": ("another part", lambda p, s: Rows().tokens(opened().open(), 0, [1])),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(case: str) -> None:
    part = opened()
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, PROMPT, want=Want.NONE))
    problem, rows = BAD_ROWS[case]
    if case == "skipped layers":
        problem = r"go on at 0\.\.8"
    with pytest.raises(EngineError, match=problem):
        part.step(rows(part, sequence))
    assert sequence.length == 8


def test_parts_without_embedding_or_head() -> None:
    part = opened(start=1, end=2)
    sequence = part.open()
    with pytest.raises(EngineError, match="enter at layer 1"):
        part.step(Rows().tokens(sequence, 0, [1], want=Want.HIDDEN))
    with pytest.raises(EngineError, match="logits"):
        part.step(Rows().hidden(sequence, 0, HIDDEN, enter=1))
    out = part.step(Rows().hidden(sequence, 0, HIDDEN + 1, enter=1, want=Want.HIDDEN, want_all=True))
    assert out.hidden.shape == (2, 48)


def test_closed_things_are_refused() -> None:
    part = opened()
    sequence, other = part.open(), part.open()
    sequence.close()
    with pytest.raises(EngineError, match="closed"):
        part.step(Rows().tokens(sequence, 0, [1]))
    with pytest.raises(EngineError, match="closed"):
        sequence.fork()
    part.close()
    part.close()
    for action in (part.open, lambda: part.step(Rows().tokens(other, 0, [1]))):
        with pytest.raises(EngineError, match="closed"):
            action()


def test_opening_is_checked() -> None:
    config = replace(CONFIG, experts=ExpertsConfig(4, 2, 8))
    with pytest.raises(EngineError, match="experts"):
        opened(RandomSource(config=config))
    with pytest.raises(EngineError, match="precision"):
        opened(precision="int3")
    with pytest.raises(EngineError, match=r"\[2, 1\)"):
        opened(start=2, end=1)
    with pytest.raises(EngineError, match="threads"):
        open_onnx(RandomSource(), 0, 3, threads=-1, kv=KvConfig())
    with pytest.raises(EngineError, match="window"):
        opened().open(window=-1)


def test_numerics_are_declared() -> None:
    numerics = opened(precision="q4").numerics
    assert numerics.id.startswith("ort-1.") and numerics.id.endswith("-q4")
    assert numerics.varies_with == {"batch", "threads", "isa"} and not numerics.exact


def test_what_only_the_native_back_end_has_is_refused() -> None:
    for changes, says in (
        ({"layer_norm": True, "o_bias": True}, "layer_norm, o_bias"),
        ({"logit_scale": 0.5}, "logit"),
    ):
        changed: dict[str, Any] = changes
        source = cast(WeightSource, SimpleNamespace(config=replace(CONFIG, **changed)))
        with pytest.raises(EngineError, match=f"the onnx back end has no {says}"):
            open_onnx(source, 0, 1, threads=1, kv=KvConfig())
