"""`isthmus inspect`: what a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from isthmus.split.bundle import Bundle
    from isthmus.split.graph_bundle import GraphBundle


def command(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle's folder")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file's sha256")] = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="Of a mixture of experts: which of them a memory budget would hold")
    ] = False,
    expert_mb: Annotated[
        float | None,
        typer.Option("--expert-mb", help="With --experts: the budget in MB; by default a quarter of the experts"),
    ] = None,
    expert_bits: Annotated[
        int, typer.Option("--expert-bits", help="With --experts: nested experts with 2, 4 or 8 bits; 0 for all")
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="With --experts: draw the experts in memory, token by token"),
    ] = None,
) -> None:
    """Show a bundle's family and shapes, and of each file its bytes, weight formats and hash.

    With --experts: how many of a mixture's experts would be in memory when their layer takes them, layer by layer and
    over time, and what would be read from flash. That is worked out from the experts that routers choose along a text;
    the recording of isthmus bench experts is taken, or one is made. What --plot draws has a row for each expert and a
    column for each token.
    """
    import json

    from isthmus.apps.cli.given import given_options
    from isthmus.protocol.errors import DeviceError

    given = given_options(ctx)
    for name in ("expert_mb", "expert_bits", "plot"):
        if name in given and not experts:
            raise DeviceError(f"--{name.replace('_', '-')} has no effect without --experts", "add that")
    if experts and verify:
        raise DeviceError("--verify has no effect with --experts", "leave one of them out")
    from isthmus.split.bundle import Bundle, is_graph
    from isthmus.split.graph_bundle import GraphBundle

    if experts:
        _experts(bundle, expert_mb, expert_bits, plot, as_json=as_json)
        return
    if is_graph(bundle):
        network = GraphBundle.open(bundle)
        if verify:
            network.verify()
        shown = describe_network(network, verified=verify)
        print(json.dumps(shown, indent=1)) if as_json else _print_network(shown)
        return
    opened = Bundle.open(bundle)
    if verify:
        opened.verify()
    facts = describe(opened, verified=verify)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)


def _experts(folder: Path, expert_mb: float | None, bits: int, plot: Path | None, *, as_json: bool) -> None:
    import json

    from isthmus.apps.cli.expert_view import look, show
    from isthmus.protocol.errors import DeviceError
    from isthmus.split.bundle import Bundle, is_graph

    if plot is not None:
        from isthmus.apps.bench.plot import check_drawing

        check_drawing(plot)
    if is_graph(folder):
        raise DeviceError(f"{folder} is a network, and has no experts", "name a mixture of experts")
    view = look(Bundle.open(folder), expert_mb, bits)
    if plot is not None:
        from isthmus.apps.cli.expert_picture import draw

        draw(plot, view)
    if as_json:
        print(json.dumps(view.to_dict()))
    else:
        show(view, folder)


def describe(bundle: Bundle, *, verified: bool = False) -> dict[str, Any]:
    """A bundle as plain JSON types; of weight files only the headers are read."""
    import msgspec

    from isthmus.split.tensorfile import TensorFile

    files: list[dict[str, Any]] = []
    for name, entry in sorted(bundle.manifest.files.items()):
        held = bundle.holds(name)
        formats: list[str] = []
        if held and name.endswith(".safetensors"):
            file = TensorFile(bundle.path / name)
            formats = sorted({format for format, _, _ in file.matrices.values()})
        files.append({"name": name, "bytes": entry.bytes, "sha256": entry.sha256, "formats": formats, "here": held})
    config = bundle.config.to_dict()
    del config["rope_inv_freq"]
    return {
        "name": bundle.name,
        "model_id": bundle.model_id,
        "weights": bundle.manifest.weights,
        "config": config,
        "layers_here": bundle.held_layers,
        "bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "bytes_here": sum(file["bytes"] for file in files if file["here"]),
        "verified": verified,
        "exits": [
            {
                **msgspec.to_builtins(entry),
                "here": bundle.holds(entry.file),
                "read_bytes": bundle.manifest.exit_bytes(entry.layer),
            }
            for entry in bundle.exits
        ],
        "tolerance": msgspec.to_builtins(bundle.manifest.tolerance),
        "chat_template": bundle.manifest.tokenizer.chat_template is not None,
        "files": files,
    }


def describe_network(bundle: GraphBundle, *, verified: bool = False) -> dict[str, Any]:
    """A network that was cut, as plain JSON types."""
    import msgspec

    told: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    files = told.pop("files")
    for gone in ("kind", "format_version"):
        del told[gone]
    return told | {
        "verified": verified,
        "files": [{"name": name, **entry, "here": bundle.holds(name)} for name, entry in sorted(files.items())],
    }


def _print_network(facts: dict[str, Any]) -> None:
    import msgspec

    from isthmus.split.graph_manifest import Named

    def arrays(told: list[dict[str, Any]]) -> str:
        return ", ".join(f"{one.name} {one.text}" for one in msgspec.convert(told, list[Named]))

    print(f"{facts['name']}, a network cut in two")
    print(f"model    {facts['model_id']}")
    print(f"inputs   {arrays(facts['inputs'])}")
    print(f"travels  {arrays(facts['crossing'])}")
    print(f"sent     {facts['codec'] or 'as it is'}")
    print(f"outputs  {arrays(facts['outputs'])}")
    for exit in facts["exits"]:
        print(f"exit     at {exit['output']}, where it is sure to {exit['confidence']:.4g}")
    if facts["kept"]:
        print(f"kept     {', '.join(facts['kept'])} (made on the device)")
    print(f"cloud    runs {'requests of several devices as one' if facts['batches'] else 'one request at a time'}")
    if facts["verified"]:
        print("hashes   all files here are what the bundle says")
    for file in facts["files"]:
        print(f"{file['name']:<40} {file['bytes']:>14,}  {file['sha256'][:16] if file['here'] else 'not here'}")


def _print(facts: dict[str, Any]) -> None:
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    c = facts["config"]
    heads = f"{c['n_heads']} query and {c['n_kv_heads']} KV heads of {c['head_dim']}"
    if latent := c.get("latent"):
        heads = f"{c['n_heads']} heads over latents of {latent['kv_rank']} and rotated keys of {latent['d_rotated']}"
    routed = c["experts"]
    experts = f", {routed['top_k']} of {routed['n_experts']} experts of {routed['d_expert']}" if routed else ""
    windows = sorted({window for window in c["windows"] if window})
    formats = sorted({format for file in facts["files"] for format in file["formats"]})
    weights = f"{', '.join(formats) or 'none here'} (split with --format {facts['weights']})"
    console.print(f"[bold]{escape(facts['name'])}[/] ({c['family']}), weights: {escape(weights)}")
    console.print(f"model    {facts['model_id']}")
    console.print(f"shape    {c['n_layers']} layers, width {c['d_model']}, {heads}, feed-forward {c['d_ff']}{experts}")
    head = "tied to the embedding" if c["tied"] else "separate"
    sliding = f", attention windows {windows}" if windows else ""
    console.print(f"tokens   vocabulary {c['vocab_size']}, context {c['context_length']}, head {head}{sliding}")
    here, whole = facts["bytes_here"] / 1e6, facts["bytes"] / 1e6
    console.print(f"here     {facts['layers_here']} of {c['n_layers']} layers, {here:.1f} of {whole:.1f} MB")
    for entry in facts["exits"]:
        console.print(_exit(entry))
    if facts["tolerance"]:
        console.print(f"bounded  {_tolerance(facts['tolerance'])}")
    if facts["verified"]:
        console.print("hashes   all files here are what the bundle says")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file", no_wrap=True)  # whole in a pipe, too
    table.add_column("bytes", justify="right")
    table.add_column("formats")
    table.add_column("sha256, checked" if facts["verified"] else "sha256 (--verify compares)")
    for file in facts["files"]:
        style = None if file["here"] else "dim"
        state = " ".join(file["formats"]) if file["here"] else "not here"
        table.add_row(escape(file["name"]), f"{file['bytes']:,}", state, file["sha256"][:16], style=style)
    console.print(table, soft_wrap=False)


def _tolerance(told: dict[str, Any]) -> str:
    """With how few bits experts may be read."""
    import msgspec

    from isthmus.apps.cli.experts import tolerance_text
    from isthmus.split.tolerance import Tolerance

    return tolerance_text(msgspec.convert(told, Tolerance))


def _exit(entry: dict[str, Any]) -> str:
    """An exit and its certificate."""
    import msgspec

    from isthmus.apps.cli.exits import certificate_text, codec_text
    from isthmus.split.certificate import Certificate
    from isthmus.split.exit_entry import CodecChoice

    agrees, names = entry["agreement"], f"{entry['head_tokens']} tokens" if entry["head_tokens"] else "all tokens"
    certificate = entry["certificate"]
    promise = (
        certificate_text(msgspec.convert(certificate, Certificate))
        if certificate
        else "no certificate: it drafts, but never emits (isthmus exits calibrate)"
    )
    agreed = f"{agrees['documents']:.1%} of documents, {agrees['answers']:.1%} of own answers"
    reads = f"reads {entry['read_bytes'] / 1e6:.1f} MB a token"
    codec = entry["codec"]
    here = "" if entry["here"] else " (not here)"
    lines = [f"exit     before layer {entry['layer']}{here}, names {names}, {reads}; agrees on {agreed}", promise]
    if codec:
        lines.append(codec_text(msgspec.convert(codec, CodecChoice)))
    return "\n         ".join(lines)
