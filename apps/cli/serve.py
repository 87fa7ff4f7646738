"""`isthmus serve`: the cloud."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.cloud.models import Model
    from isthmus.protocol.keys import AllowList, KeyPair


def command(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE...]", help="Folders made by `isthmus split`; none lets devices measure the link"
        ),
    ] = None,
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="Where devices connect")] = "tcp://127.0.0.1:5757",
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engine, 0 for one per core")] = 0,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of keys and of the list; by default $ISTHMUS_KEYS or ~/.config/isthmus/keys"
        ),
    ] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Speak in the clear, to this machine only")] = False,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Answer /metrics (Prometheus) and /health there")
    ] = None,
    openai: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Answer OpenAI's API there: /v1/models, /v1/chat and so on"),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate (PEM) of the port for OpenAI's API")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM)")] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at once; idle ones give way")] = 256,
    kv_tokens: Annotated[int, typer.Option(min=16, help="Positions of all sessions that each model's KV holds")] = 9216,
    kv_share: Annotated[
        float, typer.Option(help="Part of that KV which one owner of keys may hold when several are let in")
    ] = 0.5,
    context_s: Annotated[
        float, typer.Option(min=0, help="Seconds for which unused KV is kept for its owner's sessions; 0 keeps none")
    ] = 600.0,
    pin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A system prompt whose KV is there for every device; repeat it for more"),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where unused KV goes whose memory is needed, and comes back from"),
    ] = None,
    spill_mb: Annotated[int, typer.Option(min=1, help="Of each model there, at most; the oldest goes")] = 4096,
    kv_format: Annotated[str, typer.Option(help="f16 or f32")] = "f16",
    upstream: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A cloud behind this edge server, for networks that were cut for three"),
    ] = None,
    upstream_keys: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="This server's key as a device of that cloud, and the cloud's")
    ] = None,
    slow_down: Annotated[
        float, typer.Option(help="For measurements: take so many times as long, as a larger model would")
    ] = 1.0,
) -> None:
    """Serve models to devices, many sessions in one batch, until interrupted.

    The first start makes the cloud's own key pair. Devices on the list (`isthmus keys`) are let in, nobody else.
    """
    import gc
    import logging
    import signal
    import sys
    import time
    from functools import partial

    from isthmus.apps.cli import openai_port
    from isthmus.apps.cli.onward import Onward
    from isthmus.apps.cli.run import check_bundle, is_network
    from isthmus.cloud.admission import ServiceLimits
    from isthmus.cloud.graphs import Graph, load_graph
    from isthmus.cloud.http import StatusServer, host_port
    from isthmus.cloud.models import load
    from isthmus.cloud.service import Service
    from isthmus.cloud.spill import Spill
    from isthmus.engine.part import KvConfig
    from isthmus.engine.slow import check_slow_down
    from isthmus.protocol.address import check_listening
    from isthmus.protocol.errors import ServiceError
    from isthmus.protocol.transport import RouterTransport, check_free
    from isthmus.split.files import is_there
    from isthmus.split.graph_manifest import EDGE

    # What costs least first: the options, the address, the keys, and only then the weights.
    limits = ServiceLimits(max_sessions=max_sessions, kv_share=kv_share, context_s=context_s)
    if kv_format not in ("f16", "f32"):
        raise ServiceError(f"the KV format is {kv_format!r}", "choose f16 or f32")
    check_slow_down(slow_down)
    bundles = bundles or []
    for option, given in (("--spill", spill), ("--pin", pin)):
        if given and not bundles:
            raise ServiceError(f"{option} has no effect: no model is served", "name a bundle")
        if given and not context_s:
            raise ServiceError(f"{option} has no effect: --context-s 0 keeps no KV", "leave one of them out")
    prompts = [_prompt(path) for path in pin or []]
    if upstream is not None and not any(is_there(bundle / EDGE / "bundle.json") for bundle in bundles):
        raise ServiceError("--upstream has no effect: no bundle here was cut for three machines", "leave it out")
    for bundle in bundles:
        check_bundle(bundle)
    if len({bundle.resolve() for bundle in bundles}) < len(bundles):
        raise ServiceError("the same bundle is named twice", "name each once")
    listen = check_listening(listen, encrypted=not no_keys)
    if http is not None:
        host_port(http)
    port = None
    if openai is not None:
        spoken = [bundle for bundle in bundles if not is_network(bundle)]
        port = openai_port.checked(openai, tls_cert, tls_key, spoken, keys)
    elif tls_cert is not None or tls_key is not None:
        raise ServiceError("--tls-cert and --tls-key have no effect without --openai", "leave them out")
    check_free(listen)
    pair, allowed = (None, None) if no_keys else _keys(keys, devices_alone=port is None)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("isthmus").setLevel(logging.INFO)
    place = None if spill is None else partial(Spill, spill, max_bytes=spill_mb * 10**6, clock=time.monotonic)
    models: list[Model] = []
    closing: list[Onward] = []
    graphs: list[Graph] = []
    transport = status = beside = None
    try:
        for bundle in bundles:
            if is_network(bundle):
                onward = None
                if upstream is not None and is_there(bundle / EDGE / "bundle.json"):
                    device_keys = None if no_keys and upstream_keys is None else upstream_keys or keys
                    onward = Onward(bundle / EDGE, upstream, device_keys, no_keys and upstream_keys is None, threads)
                    closing.append(onward)
                graphs.append(load_graph(bundle, threads=threads, slow_down=slow_down, part=onward))
            else:
                kv = KvConfig(kv_format, kv_tokens)
                models.append(load(bundle, threads=threads, kv=kv, slow_down=slow_down, spill=place, pinned=prompts))
        # Only now: a device that connects earlier would wait for a handshake that nobody answers.
        transport = RouterTransport(listen, pair, allowed)
        service = Service(models, transport, allowed, limits=limits, graphs=graphs)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: service.stop())
        if http is not None:
            status = StatusServer(http, service.metrics.text, service.health)
        for model in models:
            print(f"serving {model.offer.name}: {model.offer.n_layers} layers, KV for {kv_tokens} positions")
        for graph in graphs:
            together = "requests of several devices as one" if graph.offer.batches else "one request at a time"
            print(f"serving {graph.offer.name}: a network's second part, {together}")
        if not bundles:
            print("serving no model: isthmus profile --remote measures the link")
        print(f"on {service.address}{'' if pair else ' in the clear'}")
        if pair is not None and allowed is not None:
            print(f"on the device: isthmus keys trust '{pair.public}'")
            count = len(allowed.entries())
            print(f"{count} device {'key is' if count == 1 else 'keys are'} allowed")
        if status is not None:
            print(f"status at http://{status.address}/metrics and /health")
        if port is not None:
            beside = port.open(service.address, pair, allowed)
            who = "with a token (isthmus keys token NAME)" if port.guarded else "to this machine, without tokens"
            print(f"OpenAI's API at {port.shown(beside.port)}, {who}")
        sys.stdout.flush()
        # What lives as long as the service need not be looked at by each collection.
        gc.collect()
        gc.freeze()
        service.run()
    finally:
        for one in (beside, status, transport, *models, *closing):
            if one is not None:
                one.close()
    print("stopped")


def _prompt(path: Path) -> str:
    """A system prompt out of a file, without the end of its last line."""
    from isthmus.protocol.errors import ServiceError

    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise ServiceError(f"cannot read {path}: {error.strerror}", "name a text file with --pin") from error
    except UnicodeDecodeError as error:
        raise ServiceError(f"{path} is no UTF-8 text", "name a text file with --pin") from error


def _keys(folder: Path | None, *, devices_alone: bool) -> tuple[KeyPair, AllowList]:
    """The cloud's pair, made when there is none, and the list of devices, which somebody must be on if it is all."""
    from isthmus.protocol.errors import ServiceError
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder, keys_option, read_pair, write_pair

    folder = folder or default_folder()
    allowed = AllowList(folder / ALLOWED)
    if devices_alone and not allowed.entries():
        option = keys_option(folder)
        raise ServiceError(
            f"no device is allowed in by {folder / ALLOWED}",
            f"run: isthmus keys allow 'KEY' NAME{option} (or, on one machine: isthmus keys new device{option})",
        )
    if not (folder / "server.key").exists():
        if (folder / "server.pub").exists():
            raise ServiceError(
                f"{folder} holds the key of another cloud, which its devices trust",
                "choose another folder with --keys",
            )
        return write_pair(folder, "server"), allowed
    return read_pair(folder, "server"), allowed
