"""Nested codes beside separate ones: what experts lose with 2, 4 and 8 bits, and mixed.

The model is SmolLM2 as `isthmus moefy --experts 32 --active 8` converts and tunes it, on 1,500 documents; tuning takes
it off the grid of 4 bits on which it is shipped. Nested codes are one file for three widths, fitted to the tokens that
come to each expert; separate ones are fitted in the same way to one width alone, or rounded each weight for itself: q4
is GGUF's Q4_0, q4m its Q4_1, NF4 that of QLoRA (Dettmers et al., 2305.14314), HQQ its authors' own, all in groups of
32 (where HQQ, which pads nothing, can; else of 16). Mixed ones follow an expert's share of a token, by the rule of
`isthmus experts calibrate`. Then the model is tuned on, once in floats and once as it is read (`--tune-rounded 1`).

usage: python benchmarks/nested.py [--documents 200]

The first call tunes for more than an hour. HQQ is left out unless it is there:
  pip install --no-deps --target ~/.cache/isthmus/peers/hqq hqq==0.2.8.post1 termcolor
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from models import gguf
from record import Cell, Record
from torch import Tensor

from isthmus.engine.experts import Expert
from isthmus.engine.part import WeightSource
from isthmus.quant.fitted import Aim
from isthmus.quant.groups import decode_rows, dequantize, encode_rows
from isthmus.quant.nested import view
from isthmus.split.checkpoints import open_checkpoint
from isthmus.split.exit_run import working_in
from isthmus.split.exit_samples import Texts, chunks, divided, text_files
from isthmus.split.exit_states import Sample
from isthmus.split.fetch import cache_folder, fetch
from isthmus.split.moefy_decoder import Feed, keep_freed_memory
from isthmus.split.moefy_mixture import Batch, Mixture, batches, perplexity
from isthmus.split.moefy_nested import NestedMixture
from isthmus.split.moefy_run import MoefyRun, identity, work_folder
from isthmus.split.moefy_source import Shape
from isthmus.split.moefy_training import Recipe, in_nested_bits
from isthmus.split.tokenizer import Tokenizer
from isthmus.split.tolerance_shares import mean_bits, shares

EXPERTS, ACTIVE, TAUGHT = 32, 8, 1500
BATCH = 4096  # tokens
FEW = 3.0  # bits in the mean
STORED = (0, 2.5, 5, 9)  # bits with scales, by planes
LEAST = (0.001, 0.004, 0.016, 0.064)  # errors that two bits must take away, where planes are mixed
HQQ = cache_folder().parent / "peers" / "hqq"
NF4 = (  # quantiles of a normal distribution, symmetric in number around zero
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MATRICES = ("gate", "up", "down")


def say(what: str) -> None:
    """What is under way."""
    print(what, file=sys.stderr, flush=True)


def in_format(format: str) -> Callable[[Tensor], Tensor]:
    """Rounds a matrix to one of our formats."""

    def change(w: Tensor) -> Tensor:
        return torch.from_numpy(decode_rows(format, encode_rows(w.numpy(), format), w.shape[1]))

    return change


def nf4(w: Tensor) -> Tensor:
    """Rounds to the nearest of 16 numbers, times the largest of a group of 32."""
    levels = torch.tensor(NF4)
    padded = torch.nn.functional.pad(w, (0, -w.shape[1] % 32))
    grouped = padded.reshape(len(w), -1, 32)
    scale = grouped.abs().amax(-1, keepdim=True).half().float()
    places = torch.bucketize(grouped / scale.clamp_min(1e-12), (levels[1:] + levels[:-1]) / 2)
    return (levels[places] * scale).reshape(padded.shape)[:, : w.shape[1]].contiguous()


def hqq(bits: int) -> Callable[[Tensor], Tensor]:
    """Rounds as HQQ does."""
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found, unused-ignore]

    def change(w: Tensor) -> Tensor:
        kind = {"nbits": bits, "axis": 1, "optimize": True, "round_zero": bits == 4, "bitpack": False}
        size = 32 if w.shape[1] % 32 == 0 else 16  # it pads nothing
        codes, meta = Quantizer.quantize(w, **kind, group_size=size, device="cpu", compute_dtype=torch.float32)
        found: Tensor = Quantizer.dequantize(codes, meta).reshape(w.shape).float()
        return found

    return change


def read_with(layers: Sequence[Sequence[Expert]], format: str) -> list[Feed]:
    """Fitted experts as a width reads them."""
    feeds = []
    for experts in layers:
        gate, up, down = (
            [torch.from_numpy(dequantize(view(getattr(expert, name), format))) for expert in experts]
            for name in MATRICES
        )
        feeds.append(Feed(torch.cat(gate), torch.cat(up), torch.cat(down, dim=1).contiguous()))
    return feeds


def by_expert(feed: Feed, change: Callable[[Tensor], Tensor]) -> Feed:
    """Each expert's matrices changed by themselves: groups of columns end with an expert."""
    downs = [change(part.contiguous()) for part in feed.down.chunk(EXPERTS, dim=1)]
    return Feed(change(feed.gate), change(feed.up), torch.cat(downs, dim=1).contiguous())


def error(feeds: Sequence[Feed], truth: Sequence[Feed]) -> float:
    """Of the weights: root of the squares' share."""
    off = whole = 0.0
    for feed, right in zip(feeds, truth, strict=True):
        for name in MATRICES:
            a, b = getattr(feed, name), getattr(right, name)
            off, whole = off + float((a - b).square().sum()), whole + float(b.square().sum())
    return math.sqrt(off / whole)


class Scale:
    """Perplexity of held-out documents with other experts."""

    def __init__(self, held: Sequence[Batch]) -> None:
        self._held = held

    def of(self, mixture: Mixture) -> float:
        """Of a mixture."""
        return perplexity(mixture.decoder, lambda batch: mixture.last(batch, ACTIVE), self._held)

    def read(self, nested: NestedMixture) -> tuple[float, float]:
        """Perplexity, and bits of an expert that a token is sent to, in the mean, with those of its scales."""
        with nested.recording() as recorded:
            found = self.of(nested)
        return found, mean_bits(torch.cat(recorded).numpy(), nested.shares.numpy(), STORED)


def tuned(source: WeightSource, texts: Texts, tokenizer: Tokenizer) -> tuple[MoefyRun, Mixture, list[Sample]]:
    """The converted model, and what it was tuned on; kept in the cache folder."""
    called = identity(source)
    run = MoefyRun(source, called, Shape(EXPERTS, ACTIVE), work_folder(called), begin)
    taught = chunks(tokenizer, texts.taught[:: len(texts.taught) // TAUGHT][:TAUGHT], source.config.context_length)
    return run, run.tune(run.convert(taught), taught, Recipe(epochs=1)), taught


def begin(step: str) -> Callable[[int, int], None]:
    """Tells of a step's progress."""

    def tell(done: int, total: int) -> None:
        if done == total or done % 20 == 0:
            say(f"{step}: {done} of {total}")

    return tell


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200, help="held out")
    asked = parser.parse_args()
    record = Record("nested", settings=vars(asked))
    keep_freed_memory()
    source = open_checkpoint(gguf(), format="keep")
    texts, tokenizer = divided(text_files([fetch("texts")])), source.tokenizer()
    held = batches(chunks(tokenizer, texts.held[: asked.documents], source.config.context_length), BATCH)
    with working_in(work_folder(identity(source))):
        run, mixture, taught = tuned(source, texts, tokenizer)
        compare(record, run, mixture, taught, Scale(held))
    record.write()


def compare(record: Record, run: MoefyRun, mixture: Mixture, taught: list[Sample], scale: Scale) -> None:
    """All codes, one after the other."""
    rows, plain = list[list[Cell]](), scale.of(mixture)

    def add(name: str, bits: float, feeds: list[Feed], of: Mixture = mixture) -> float:
        read = Mixture(of.decoder, feeds, of.routers, of.pre_gate)
        return told(name, bits, scale.of(read), error(feeds, of.feeds))

    def told(name: str, bits: float, found: float, off: float | str) -> float:
        say(f"{name}: {found:.3f}")
        rows.append([name, bits, found, f"{found / plain - 1:+.2%}", off])
        record.figure(f"perplexity/{name}", found, "")
        return found

    def alone(change: Callable[[Tensor], Tensor]) -> list[Feed]:
        return [by_expert(feed, change) for feed in mixture.feeds]

    def own(format: str, aim: Aim) -> list[Feed]:
        return read_with(run.experts(mixture, taught, format, aim), format)

    def few(name: str, of: Mixture, widths: list[list[Feed]]) -> float:
        mixed = NestedMixture(of, "n8")
        mixed.set_rounding(widths)
        mixed.shares = mixed.within(batches(taught, BATCH)[0], ACTIVE, FEW)
        found, bits = scale.read(mixed)
        return told(f"{name}, {FEW:g} bits", bits, found, "")

    def every_width(layers: Sequence[Sequence[Expert]]) -> list[list[Feed]]:
        return [read_with(layers, format) for format in ("n2", "n4", "n8")]

    add("float", 32, mixture.feeds)
    widths = every_width(run.experts(mixture, taught, "n8"))
    eight = add("nested, 8 bits", 9, widths[2])
    add("q8", 8.5, alone(in_format("q8")))
    four = add("nested, 4 bits", 5, widths[1])
    add("fitted to 4 bits alone", 4.5, own("n4", Aim(0, 1, 0)))
    add("q4", 4.5, alone(in_format("q4")))
    add("q4m", 5, alone(in_format("q4m")))
    add("NF4", 4.5, alone(nf4))
    if HQQ.is_dir():
        sys.path.append(str(HQQ))
        add("HQQ, 4 bits", 5, alone(hqq(4)))
    add("nested, 2 bits", 2.5, widths[0])
    add("fitted to 2 bits alone", 2.5, own("n2", Aim(1, 0, 0)))
    add("nested, 2 bits, not fitted", 2.5, alone(in_format("n2")))
    if HQQ.is_dir():
        add("HQQ, 2 bits", 3, alone(hqq(2)))
    mixed = NestedMixture(mixture, "n8")
    mixed.set_rounding(widths)
    for least in LEAST:
        mixed.shares = torch.from_numpy(shares(mixed.errors(), least))
        found, bits = scale.read(mixed)
        told(f"nested, mixed, {least:g}", bits, found, "")
    few("nested, mixed", mixture, widths)
    recipe, called = in_nested_bits("n8", epochs=1), identity(run.source)
    control = MoefyRun(run.source, called, run.shape, work_folder(called) / "control", begin)
    longer = control.tune(mixture, taught, replace(recipe, format=None))
    add("tuned on in floats, float", 32, longer.feeds, longer)
    widths = every_width(control.experts(longer, taught, "n8"))
    add("tuned on in floats, 8 bits", 9, widths[2], longer)
    few("tuned on in floats, mixed", longer, widths)
    through = run.tune(mixture, taught, recipe)
    widths = every_width(run.experts(through, None, "n8"))
    for codes, bits, feeds in zip((2, 4, 8), STORED[1:], widths, strict=True):
        add(f"tuned on in nested bits, {codes} bits", bits, feeds, through)
    three = few("tuned on in nested bits, mixed", through, widths)
    record.figure("8 bits", eight, "perplexity", target=1.002, of="perplexity/float", at_most=True)
    record.figure("4 bits", four, "perplexity", target=1.01, of="perplexity/fitted to 4 bits alone", at_most=True)
    record.figure("3 bits", three, "perplexity", target=1.01, of="perplexity/tuned on in floats, 8 bits", at_most=True)
    note = (
        f"{EXPERTS} experts, {ACTIVE} active. Perplexity of held-out documents; bits of whole groups with all scales "
        "of the planes that are read (mixed: in the mean); error: root of the squares of what weights are off by, as a "
        "share of theirs. Mixed: two bits are read where they take away so much error, times an expert's share, or so "
        f"that codes have {FEW:g} bits in the mean. Tuned on for one pass: in floats, and fitted; or as read with "
        f"{FEW:g} bits in the mean and with all, and each weight rounded for itself."
    )
    record.table("codes", ["weights", "bits", "perplexity", "more", "error"], rows, note=note)


if __name__ == "__main__":
    main()
