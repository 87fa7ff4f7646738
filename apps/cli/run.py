"""`isthmus run`: asks a model once, or chats with it; or runs a network that was cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from isthmus.apps.cli.tokens import Screen
    from isthmus.edge import Device, ExpertSettings, Stats, Token


def command(
    ctx: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(help="The bundle's folder; with --cloud, one that is not there is fetched from the cloud")
    ],
    prompt: Annotated[str | None, typer.Option(help="Ask this and end; - reads it from standard input")] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="For a network: arrays to run it on, .npz by name or .npy, or a picture"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="For a network: write its outputs there, .npz")
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="For a network: run it so many times, and tell the medians")] = 1,
    depth: Annotated[
        int,
        typer.Option(min=0, help="For a network: a pipeline with so many inputs under way in the cloud; 0 for none"),
    ] = 0,
    no_exits: Annotated[
        bool, typer.Option("--no-exits", help="For a network: go on to the end even where an exit is sure")
    ] = False,
    mode: Annotated[
        str,
        typer.Option(
            help="auto, local, stream (the cloud computes all), verify (this device drafts, the cloud checks), exit "
            "(this device where it is sure, else the cloud) or split"
        ),
    ] = "auto",
    cut: Annotated[
        int | None,
        typer.Option(help="Layers on this device: by default the middle in split mode, the deepest exit in exit mode"),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            help="How hidden states travel: f32, f16, int8, or ecsqN (N 2 to 8, 12, 16, 32: the lower, the coarser and "
            "smaller); by default f16 in split, and in exit mode what the exit was calibrated with, else ecsq6. Of a "
            "network that was cut: raw, zstd, f16 or intN (2 to 8 by halves, as int4.5), by default as it was planned",
            show_default=False,
        ),
    ] = "",
    threshold: Annotated[
        float | None,
        typer.Option(help="Confidence from which on exit mode believes the exit; by default its certificate's"),
    ] = None,
    draft: Annotated[
        str,
        typer.Option(
            metavar="ngrams|exit|FOLDER",
            help="What verify mode drafts with: the conversation's n-grams, the bundle's exit, or a small model's "
            "bundle with the same tokenizer",
        ),
    ] = "ngrams",
    draft_depth: Annotated[
        int,
        typer.Option("--draft-depth", help="Drafts that may be under way at once in verify mode; 1 waits for each"),
    ] = 8,
    prefer: Annotated[
        str,
        typer.Option(
            metavar="speed|cloud-cost|privacy",
            help="What auto is after: speed, little of the cloud's time, or privacy (no cloud is spoken to)",
        ),
    ] = "speed",
    max_disagreement: Annotated[
        float,
        typer.Option(
            "--max-disagreement",
            help="Share of tokens that auto may let exits decide otherwise than the model, as certificates promise; "
            "near-ties that turn because states travel rounded come on top",
        ),
    ] = 0.0,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say on standard error why auto works as it does, and when it changes; see above"
        ),
    ] = False,
    cloud: Annotated[str | None, typer.Option(help="The cloud's address: HOST:PORT")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME|ID", help="Which of the cloud's models to fetch, when it serves several")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with this device's key and the cloud's public key; by default $ISTHMUS_KEYS or "
            "~/.config/isthmus/keys",
        ),
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Talk in the clear, to a cloud on this machine only")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability")] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens, 0 for all")] = 0,
    seed: Annotated[
        int, typer.Option(help="Fixes the text at a temperature (with --codec f32 wherever it is computed)")
    ] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="A word that ends the answer; may be repeated")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer at most")] = 512,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template")] = False,
    threads: Annotated[int, typer.Option(help="Threads of the engine, 0 for one a core")] = 0,
    memory_mb: Annotated[
        float | None, typer.Option("--memory-mb", help="Refuse what needs more memory than this, in MB")
    ] = None,
    expert_mb: Annotated[
        float | None,
        typer.Option(
            "--expert-mb",
            help="For a mixture of experts: memory that they may take, in MB; others are read when they are needed",
        ),
    ] = None,
    experts: Annotated[
        str,
        typer.Option(
            metavar="exact|bounded|cloud",
            help="With --expert-mb: exact; bounded: with as few bits as isthmus experts calibrate found good enough; "
            "cloud: exact, and the cloud is asked while a token would wait for experts for longer than a round trip",
        ),
    ] = "exact",
    expert_bits: Annotated[
        int,
        typer.Option(
            "--expert-bits", help="With --expert-mb: read nested experts with 2, 4 or 8 bits; 0 for all that are there"
        ),
    ] = 0,
    flash_mb_s: Annotated[
        float, typer.Option("--flash-mb-s", help="With --expert-mb: pretend that flash reads so many MB/s; 0 for none")
    ] = 0.0,
    placement: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --expert-mb: read the experts that isthmus experts place gave to memory before the first token",
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option("--kv-tokens", help="Tokens of a conversation; by default the model's context, up to 4096"),
    ] = None,
    overflow: Annotated[
        str, typer.Option(help="When a conversation grows longer: error, or slide (the last tokens only)")
    ] = "error",
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the conversation in this file, and go on with the one that it holds: the same command finishes "
            "its cut-off answer, or prints the one that is complete",
        ),
    ] = None,
    on_rollback: Annotated[
        str,
        typer.Option(
            "--on-rollback",
            metavar="replace|keep",
            help="What becomes of words that were guessed while the cloud was silent and that it would not have said",
        ),
    ] = "replace",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text")] = False,
) -> None:
    """Ask a model, or chat with it when there is no --prompt; run a network on arrays (--input).

    Without --cloud everything is computed on this device. With it, auto measures device, cloud and link, and works in
    the way that ends the answer first, token by token, among those that keep to the text of the cloud's model
    (--max-disagreement lets exits speak, too); it goes on alone when the cloud cannot be reached. In verify mode this
    device guesses ahead and the cloud checks: the text is that of stream mode, and the cloud makes fewer steps where
    guesses are right. In exit mode the device says by itself what its exit is sure of, and asks the cloud about the
    rest; `isthmus inspect` shows what the exit's certificate promises. With the codec f32 the text of split mode does
    not depend on where its tokens are computed; the others send less and may change it.

    --explain prints what each way would take for the rest of the answer: in all, for a token, until the first one, and
    of the cloud's time for a token. "verify exit 27 x4" drafts four tokens at a time with the exit before layer 27, and
    "pipelined" drafts on while they are checked; "exit 20 coded at 0.62" believes that exit from that confidence on.

    Of a network that was cut, the first part runs here. In auto the rest runs where it lately took less time, here or
    in the cloud; with --mode split always in the cloud, with --mode local always here.

    On a terminal tokens are coloured by where they were computed: green on this device, blue in the cloud, magenta in
    both, cyan by the device and checked, yellow by an exit; guesses that the cloud has not confirmed are underlined.
    """
    import sys

    from isthmus.apps.cli.chat import chat
    from isthmus.apps.cli.fetching import Fetching
    from isthmus.apps.cli.infer import infer
    from isthmus.apps.cli.tokens import Screen, speaking_up
    from isthmus.edge import Device, ExpertSettings
    from isthmus.edge.drafting import files_for
    from isthmus.engine.sampling import Sampling
    from isthmus.protocol.errors import DeviceError

    check_bundle(bundle)
    if is_network(bundle):
        infer(ctx)
        return
    for name, value in (
        ("input", input_),
        ("output", output),
        ("times", times - 1),
        ("depth", depth),
        ("no-exits", no_exits),
    ):
        if value:
            raise DeviceError(f"--{name} is for networks", "ask this language model with --prompt")
    if json and prompt is None:
        raise DeviceError("--json needs a prompt", "give one with --prompt, or --prompt - for standard input")
    if on_rollback not in ("replace", "keep"):
        raise DeviceError(f"--on-rollback is {on_rollback!r}", "choose replace or keep")
    text = _read(prompt) if prompt is not None else ""
    sampling = Sampling(temperature, top_k, top_p, seed)
    _check_effects(ctx)
    if greedy:
        sampling = Sampling()
    held = None
    if expert_mb is not None:
        held = ExpertSettings(expert_mb, expert_bits, flash_mb_s, experts, placement)  # type: ignore[arg-type]
        _foretell(bundle, held, threads)
    screen, reasons = Screen(), list[str]()
    alone = cloud is None and experts != "cloud"
    mode = "local" if alone and mode == "auto" and not explain else mode
    with (
        speaking_up(screen),
        Fetching(bundle, files_for(mode, draft), cut) as fetching,
        Device(
            bundle,
            cloud,
            model=model,
            keys=keys,
            encrypted=not no_keys,
            mode=mode,
            cut=cut,
            codec=codec,
            threshold=threshold,
            draft=draft,
            draft_depth=draft_depth,
            threads=threads,
            memory_mb=memory_mb,
            experts=held,
            kv_tokens=kv_tokens,
            overflow=overflow,  # type: ignore[arg-type]
            on_rollback=screen.rollback if on_rollback == "replace" and not json else on_rollback,  # type: ignore[arg-type]
            resume=resume,
            prefer=prefer,
            max_disagreement=max_disagreement,
            explain=(reasons.append if json else partial(_explain, screen)) if explain else None,
            progress=fetching.progress,
        ) as device,
    ):
        fetching.done()
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop or ()}
        cut_off, told = device.unfinished, reasons if explain else None
        if cut_off is not None and prompt is not None and cut_off.question != text:
            print(f"note: another answer was cut off in {resume} and stays so", file=sys.stderr)
        if device.answered is not None and not raw and device.messages[-2:-1] == [{"role": "user", "content": text}]:
            _again(device.answered, json, f"{resume} holds this answer already; another file gets another one")
        elif cut_off is not None and (prompt is None or cut_off.question == text):
            _answer(device, screen, device.go_on(), max_tokens, cut_off.text, json=json, reasons=told, kept=True)
        elif prompt is not None:
            tokens = device.generate(text, **options) if raw else device.chat(text, **options)
            _answer(device, screen, tokens, max_tokens, json=json, reasons=told, kept=resume is not None)
        if prompt is None:
            chat(device, screen, raw, cloud is not None, options)


def _foretell(bundle: Path, experts: ExpertSettings, threads: int) -> None:
    """Says on a terminal what speed is to be expected; elsewhere nobody reads it."""
    import sys

    from isthmus.apps.cli.foretold import foretold
    from isthmus.apps.cli.tokens import dim

    if sys.stderr.isatty() and (line := foretold(bundle, experts, threads)):
        print(dim(line, sys.stderr), file=sys.stderr, flush=True)


def _again(answered: Stats, json: bool, note: str) -> None:
    """Prints an answer that was given before."""
    import sys
    from json import dumps

    print(dumps(answered.to_dict(), ensure_ascii=False) if json else answered.text)
    print(f"note: {note}", file=sys.stderr)


def check_bundle(bundle: Path) -> None:
    """Says how to make a bundle of what is a model's file.

    Raises:
        BundleError: it is a file.
    """
    from shlex import quote

    from isthmus.protocol.errors import BundleError

    if bundle.is_file():
        command = f"isthmus split {quote(str(bundle))} -o {quote(bundle.stem)}"
        raise BundleError(f"{bundle} is a file, not a bundle", f"if it is a model, run: {command}")


def is_network(bundle: Path) -> bool:
    """Whether a folder holds a network that was cut, and no language model; one that is not there holds none."""
    from isthmus.split.files import is_there

    if not is_there(bundle / "bundle.json"):
        return False
    from isthmus.split.bundle import is_graph

    return is_graph(bundle)


def _check_effects(ctx: typer.Context) -> None:
    """Refuses options that would have no effect beside the others.

    Raises:
        DeviceError: there is one.
    """
    from isthmus.apps.cli.given import given_options
    from isthmus.edge.options import as_mode
    from isthmus.protocol.errors import DeviceError

    def refuse(option: str, why: str, remedy: str = "") -> None:
        raise DeviceError(f"--{option} {why}", remedy or f"leave --{option} out")

    given = given_options(ctx)
    mode = as_mode(ctx.params["mode"])
    if "cloud" not in given:
        if mode in ("split", "stream", "verify", "exit"):
            raise DeviceError(f"{mode} mode needs a cloud", "name one with --cloud HOST:PORT")
        for name in ("keys", "no_keys", "on_rollback"):
            if name in given:
                refuse(name.replace("_", "-"), "has no effect without --cloud", "name a cloud, or leave it out")
    if {"keys", "no_keys"} <= given:
        refuse("keys", "has no effect with --no-keys", "choose one of them")
    for name in ("experts", "expert_bits", "flash_mb_s", "placement"):
        if name in given and "expert_mb" not in given:
            refuse(name.replace("_", "-"), "has no effect without --expert-mb", "add that, or leave it out")
    if {"greedy", "temperature"} <= given:
        refuse("temperature", "has no effect with --greedy", "choose one of them")
    if mode not in ("split", "exit") and not (
        "cloud" in given and "prompt" not in given
    ):  # a chat may come to it with /mode
        for name in ("cut", "codec"):
            if name in given:
                refuse(name, "has no effect without --mode split or exit", "add that, or leave it out")
    if mode != "exit" and "threshold" in given and not ("cloud" in given and "prompt" not in given):
        refuse("threshold", "has no effect without --mode exit", "add that, or leave it out")
    for name in ("prefer", "max_disagreement", "explain"):
        if name in given and mode != "auto" and not ("cloud" in given and "prompt" not in given):
            refuse(name.replace("_", "-"), "has no effect without --mode auto", "leave one of them out")
    if mode != "verify" and not ("cloud" in given and "prompt" not in given):
        small = mode == "auto" and ctx.params["draft"] not in ("ngrams", "exit")  # which auto weighs, too
        for name in ("draft_depth",) if small else ("draft", "draft_depth"):
            if name in given:
                refuse(name.replace("_", "-"), "has no effect without --mode verify", "add that, or leave it out")


def _read(prompt: str) -> str:
    import sys

    from isthmus.edge.text import utf8
    from isthmus.protocol.errors import DeviceError

    try:
        text = utf8(sys.stdin.read() if prompt == "-" else prompt)
    except (UnicodeDecodeError, OSError) as error:
        raise DeviceError("standard input cannot be read", "give UTF-8 text there, or as the prompt itself") from error
    if not text.strip():
        raise DeviceError("the prompt is empty", "write what the model shall answer or go on from")
    return text


def _explain(screen: Screen, why: str) -> None:
    import sys

    before = "\n" if screen.pause() else ""  # both may be one file
    print(f"{before}auto: {why}", file=sys.stderr)


def _answer(
    device: Device,
    screen: Screen,
    tokens: Iterable[Token],
    max_tokens: int,
    so_far: str = "",
    *,
    json: bool,
    reasons: list[str] | None,
    kept: bool,
) -> None:
    import sys
    from json import dumps

    from isthmus.apps.cli.chat import cut_off, tell_note
    from isthmus.apps.cli.tokens import dim, expert_summary, has_color, summary
    from isthmus.protocol.errors import LinkError

    note = tell_note(device)
    if json:
        for _ in tokens:
            pass
        tell_note(device, note)
        told = device.stats.to_dict() | ({} if reasons is None else {"explain": reasons})
        if device.expert_report is not None:
            told["experts"] = device.expert_report.to_dict()
        print(dumps(told, ensure_ascii=False))
        return
    try:
        screen.show(tokens, so_far)
    except LinkError as error:
        if not (made := len(device.stats.tokens)):
            raise
        again = "the same command goes on" if kept else "with --resume FILE the same command would go on"
        problem = f"{error.problem}: the answer broke off after {made} tokens"
        raise LinkError(problem, f"{error.remedy}; {again}") from error
    tell_note(device, note)
    cut_off(device, max_tokens)
    if has_color(sys.stdout):
        print(dim(summary(device.stats), sys.stderr), file=sys.stderr)
        if device.expert_report is not None:
            print(dim(expert_summary(device.expert_report), sys.stderr), file=sys.stderr)
    elif device.stats.unverified:
        print(f"note: {device.stats.unverified} tokens are guesses that no cloud confirmed", file=sys.stderr)
