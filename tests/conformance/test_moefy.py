"""Dense models made into mixtures of experts: nothing is lost with all experts, and routers choose well."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="making experts needs torch==2.13.0")
pytest.importorskip("scipy")

from isthmus.apps.cli.main import main  # noqa: E402
from isthmus.engine import KvConfig, open_part  # noqa: E402
from isthmus.engine.binding import cpu_names  # noqa: E402
from isthmus.engine.config import ExpertsConfig  # noqa: E402
from isthmus.engine.part import Rows, Want, WeightSource  # noqa: E402
from isthmus.protocol.errors import ModelError  # noqa: E402
from isthmus.split import moefy_run, moefy_training  # noqa: E402
from isthmus.split.bundle import Bundle  # noqa: E402
from isthmus.split.exit_states import Sample  # noqa: E402
from isthmus.split.moefy_decoder import Decoder, Feed  # noqa: E402
from isthmus.split.moefy_experts import Routing, grouped, log_energies, recall  # noqa: E402
from isthmus.split.moefy_fit import rounded  # noqa: E402
from isthmus.split.moefy_mixture import Mixture, batches  # noqa: E402
from isthmus.split.moefy_run import MoefyRun, identity  # noqa: E402
from isthmus.split.moefy_source import ConvertedSource, Shape  # noqa: E402
from isthmus.split.moefy_training import Recipe  # noqa: E402
from tests.conformance.tiny import DENSE, VOCAB, Tiny, build  # noqa: E402
from tests.edge_bundle import Weights  # noqa: E402

RNG = np.random.default_rng(3)
SAMPLES = [Sample(RNG.integers(0, VOCAB, int(n)).tolist()) for n in RNG.integers(9, 40, 24)]
TOKENS = RNG.integers(0, VOCAB, 30).tolist()
native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moefy_run, "fast_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("tiny"))


def run_of(source: WeightSource, shape: Shape, work: Path) -> MoefyRun:
    return MoefyRun(source, identity(source), shape, work, lambda _: lambda done, total: None)


def native_logits(source: WeightSource, tokens: Sequence[int]) -> NDArray[np.float32]:
    part = open_part(source, 0, source.config.n_layers, threads=1, kv=KvConfig("f32", 64))
    found = part.step(Rows().tokens(part.open(), 0, list(tokens), want=Want.LOGITS, want_all=True)).logits
    part.close()
    return found


def tensors(mixture: Mixture) -> list[NDArray[np.float32]]:
    feeds = [weight for feed in mixture.feeds for weight in (feed.gate, feed.up, feed.down)]
    return [tensor.numpy() for tensor in (*feeds, *mixture.routers)]


@pytest.mark.parametrize("case", DENSE)
def test_the_decoder_says_what_transformers_does(case: str, tmp_path: Path) -> None:
    tiny = build(case, tmp_path)
    decoder = Decoder(tiny.source)
    logits = decoder.logits(decoder.last(torch.tensor([TOKENS]))).numpy()
    np.testing.assert_allclose(logits, tiny.logits([TOKENS]), atol=2e-4)


@native
@pytest.mark.parametrize("case", ["llama", "llama-odd", "qwen2", "qwen3", "mistral"])
def test_with_all_experts_nothing_changes(case: str, tmp_path: Path) -> None:
    source, shape = build(case, tmp_path).source, Shape(8, 8)
    mixture = run_of(source, shape, tmp_path / "work").convert(SAMPLES)
    converted = ConvertedSource(source, shape, [rounded(feed, 8, "f32") for feed in mixture.feeds], mixture.routers)
    assert converted.config.experts == ExpertsConfig(8, 8, source.config.d_ff // 8, weigh=False)
    np.testing.assert_allclose(native_logits(converted, TOKENS), native_logits(source, TOKENS), atol=1e-4)


@native
def test_the_engine_chooses_as_the_training_does(tiny: Tiny, tmp_path: Path) -> None:
    shape = Shape(8, 3)
    mixture = run_of(tiny.source, shape, tmp_path).convert(SAMPLES)
    experts = [rounded(feed, 8, "f32") for feed in mixture.feeds]
    converted = ConvertedSource(tiny.source, shape, experts, mixture.routers)
    (batch,) = batches([Sample(TOKENS)], 64)
    logits = mixture.decoder.logits(mixture.last(batch, 3)).numpy()
    np.testing.assert_allclose(native_logits(converted, TOKENS), logits, atol=1e-3)
    assert np.abs(logits - tiny.logits([TOKENS])[0]).max() > 0.01  # of its experts 5 are left out


def planted(tokens: int) -> tuple[Feed, Any]:
    """Four groups of neurons, in disorder, each awake for tokens of its own kind; and what the network reads."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (tokens,), generator=rng)
    read = torch.nn.functional.one_hot(kinds, 16).float() * 4 + 0.1 * torch.randn(tokens, 16, generator=rng)
    gate = torch.zeros(32, 16)
    gate[torch.arange(32), torch.arange(32) % 4] = 2.0
    gate[:, :4] -= 1.0
    up, down = torch.randn(32, 16, generator=rng), torch.randn(16, 32, generator=rng)
    return Feed(gate, up, down), read


def test_neurons_that_belong_together_are_found_and_chosen() -> None:
    feed, read = planted(600)
    found = grouped(feed, read, experts=4, active=1)
    groups = (found.order % 4).view(4, 8)
    assert (groups == groups[:, :1]).all() and found.held > 0.95
    ordered, routing = feed.ordered(found.order), Routing(16, 4)
    truth = log_energies(ordered.hidden(read, torch.float32), ordered.down, 4)
    routing.add(read[:400], truth[:400])
    assert recall(read[400:] @ routing.router().T, truth[400:], 1) > 0.95


def test_energies_are_those_of_experts_outputs() -> None:
    feed, read = planted(20)
    hidden = feed.hidden(read, torch.float32)
    apart = torch.stack([hidden[:, e * 8 : e * 8 + 8] @ feed.down[:, e * 8 : e * 8 + 8].T for e in range(4)], 1)
    expected = apart.square().sum(-1).clamp_min(1e-6 * float(apart.square().sum(-1).mean()))
    np.testing.assert_allclose(log_energies(hidden, feed.down, 4).exp(), expected, rtol=1e-3)


def test_a_pre_gate_reads_the_layer_before(tiny: Tiny, tmp_path: Path) -> None:
    own = run_of(tiny.source, Shape(8, 3), tmp_path / "own").convert(SAMPLES)
    ahead = run_of(tiny.source, Shape(8, 3, pre_gate=True), tmp_path / "ahead").convert(SAMPLES)
    np.testing.assert_array_equal(ahead.routers[0], own.routers[0])  # there is no layer before
    assert not np.allclose(ahead.routers[1], own.routers[1])
    (batch,) = batches([Sample(TOKENS)], 64)
    changed = [*ahead.routers[:1], *(-router for router in ahead.routers[1:])]
    other = Mixture(ahead.decoder, ahead.feeds, changed, pre_gate=True)
    assert not torch.equal(ahead.last(batch, 3), other.last(batch, 3))
    assert Shape(8, 3, pre_gate=True).of(tiny.source.config).experts == ExpertsConfig(
        8, 3, 12, weigh=False, pre_gate=True
    )


@pytest.mark.parametrize("pre_gate", [False, True])
def test_tuning_goes_on_where_it_was_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre_gate: bool
) -> None:
    monkeypatch.setattr(moefy_training, "KEPT_STEPS", 2)
    recipe, shape = Recipe(epochs=3, batch_tokens=128, warmup=2), Shape(8, 3, pre_gate)
    apart: list[float] = []

    def tuned(work: Path, stop: int = 0) -> Mixture:
        def say(step: str) -> Any:
            def tell(done: int, total: int) -> None:
                if step == "tuning" and done == stop:
                    raise KeyboardInterrupt

            return tell

        run = MoefyRun(tiny.source, identity(tiny.source), shape, work, say)
        return run.tune(run.convert(SAMPLES), SAMPLES, recipe)

    whole = tuned(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "parts", stop=5)
    monkeypatch.setattr(moefy_run, "grouped", None)  # what was grouped is not grouped again
    resumed = tuned(tmp_path / "parts")
    for one, other in zip(tensors(whole), tensors(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(moefy_training, "Watch", None)  # nor is what was tuned tuned again
    np.testing.assert_array_equal(tensors(tuned(tmp_path / "parts"))[0], tensors(whole)[0])
    plain = run_of(tiny.source, shape, tmp_path / "whole").convert(SAMPLES)
    judge = moefy_training.Judge(plain.decoder, SAMPLES, VOCAB)
    for mixture in (plain, whole):
        each = batches(SAMPLES, 128)
        apart.append(sum(judge.compare(mixture.last(batch, 3), batch)[0] for batch in each))
    assert apart[1] < apart[0]


@pytest.mark.parametrize(
    ("shape", "told"),
    [((7, 2), "do not make 7 experts"), ((8, 9), "9 of 8 experts"), ((1, 1), "no mixture"), ((8, 0), "0 of 8")],
)
def test_shapes_that_cannot_be(tiny: Tiny, shape: tuple[int, int], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        Shape(*shape).of(tiny.source.config)


def test_a_mixture_is_not_made_into_one(tmp_path: Path) -> None:
    config = replace(Weights(0).config, experts=ExpertsConfig(4, 2, 24))
    with pytest.raises(ModelError, match="has 4 experts a layer already"):
        Shape(4, 2).of(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from tests.small_gguf import write_gguf

    folder = tmp_path_factory.mktemp("moefy")
    write_gguf(folder / "Small-1M.Q8_0.gguf")
    words = ["sea", "tea", "rain", "moon", "chess", "bread"]
    lines = [json.dumps({"text": " ".join(RNG.choice(words, 12))}) for _ in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def asked(folder: Path, output: Path, *options: str) -> list[str]:
    settings = ["--experts", "8", "--active", "2", "--threads", "1", "--work", str(folder / "work")]
    texts = ["--text", str(folder / "texts.jsonl")]
    return ["moefy", str(folder / "Small-1M.Q8_0.gguf"), "-o", str(output), *texts, *settings, *options]


def test_the_command_makes_a_bundle_and_tells_what_it_costs(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(asked(folder, tmp_path / "b", "--tune", "0.5", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(tmp_path / "b")
    assert told["model_id"] == bundle.model_id and bundle.name == "Small-1M-8x2"
    assert bundle.config.experts == ExpertsConfig(8, 2, 8, weigh=False)
    assert bundle.layer(0)["experts.7.down"].format == "n8"  # type: ignore[union-attr]
    assert [one["active"] for one in told["figures"]] == [1, 2, 4, 6, 8]
    assert told["figures"][-1]["recall"] == 1 and told["dense_perplexity"] > 1
    assert main(asked(folder, tmp_path / "again", "--tune", "0.5", "--counts", "2,8")) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "25%" in shown and "dense" in shown and "another model" in shown
    assert Bundle.open(tmp_path / "again").model_id == bundle.model_id
    assert main(asked(folder, tmp_path / "again")) == 2
    refused = capsys.readouterr()
    assert "exists already" in refused.err and "experts:" not in refused.err


def test_the_command_tunes_through_the_rounding(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--tune-rounded", "0.5", "--counts", "2", "--json"]
    assert main(asked(folder, tmp_path / "b", *options)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rounded_epochs"] == 0.5 and told["tuned_epochs"] == 0
    assert Bundle.open(tmp_path / "b").layer(0)["experts.0.up"].format == "n8"  # type: ignore[union-attr]
    assert main(asked(folder, tmp_path / "plain", "--counts", "2", "--json")) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["rounded_epochs"] == 0 and plain["figures"] != told["figures"]


@native
def test_its_bundle_runs_as_it_was_with_all_experts(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(asked(folder, tmp_path / "b", "--active", "8", "--format", "f32", "--counts", "8")) == 0
    assert main(["split", str(folder / "Small-1M.Q8_0.gguf"), "-o", str(tmp_path / "d")]) == 0
    found = [native_logits(Bundle.open(tmp_path / name), TOKENS) for name in ("b", "d")]
    # The engine rounds what it multiplies 8-bit weights with, and does not where they are float32.
    assert np.abs(found[0] - found[1]).max() < 0.05 * np.abs(found[1]).max()
    line = capsys.readouterr().out.splitlines()
    assert any("8 experts of 8 neurons a layer, 8 active" in one for one in line)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--experts", "7"], "64 neurons a layer do not make 7 experts of one size; choose another number"),
        (["--active", "9"], "9 of 8 experts cannot be active"),
        (["--format", "q9"], "weight format 'q9' is unknown"),
        (["--format", "q8", "--tune-rounded", "1"], "experts are not tuned in q8: it is not nested; choose n2, n4 or"),
        (["--counts", "2,9"], "give numbers from 1 to 8"),
        (["--counts", "x"], "give numbers, as 4,8,16"),
    ],
)
def test_errors_say_what_to_do(folder: Path, tmp_path: Path, capsys: Capture, options: list[str], told: str) -> None:
    assert main(asked(folder, tmp_path / "b", *options)) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_what_is_missing_is_told(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model, target = str(folder / "Small-1M.Q8_0.gguf"), ["-o", str(tmp_path / "b"), "--experts", "8"]
    assert main(["moefy", model, *target]) == 2
    assert "there is no text to learn from" in capsys.readouterr().err
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": "a sea of tea"}) for _ in range(12)))
    assert main(["moefy", model, *target, "--text", str(tmp_path / "few.jsonl")]) == 2
    assert "tokens of text are too few" in capsys.readouterr().err
    assert main(["moefy", "smollm2", *target]) == 2
    assert "smollm2 is not on this machine" in capsys.readouterr().err
    for module in [name for name in sys.modules if name.startswith("isthmus.split.moefy")]:
        monkeypatch.delitem(sys.modules, module)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        assert main(["moefy", model, *target]) == 2
    assert "making experts needs PyTorch" in capsys.readouterr().err
    assert main(["moefy", "nothing", *target]) == 2
    assert "does not exist" in capsys.readouterr().err
