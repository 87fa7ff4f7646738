"""`isthmus doctor`: what this machine has, which kernels are used, and why something is slow."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.apps.bench.machine import Machine, installed_extras, read_machine
from isthmus.apps.cli.advice import Finding, findings

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Checkup:
    """What the doctor found.

    Attributes:
        kernels: kernel families that the native engine can run here, the best first; empty when it is not built.
        chosen: the one it would use, "onnxruntime", or "none" when that is not installed either.
        bandwidth: threads -> bytes read a second, measured.
        bundle_bytes: weights that one token reads, 0 when no bundle was named.
        steal: share of processor time that the host took away while measuring, 0..1.
    """

    machine: Machine
    kernels: tuple[str, ...]
    chosen: str
    extras: dict[str, dict[str, str | None]]
    cache: str
    cache_bytes: int
    bandwidth: dict[int, float]
    bundle: str | None
    bundle_bytes: int
    steal: float
    findings: list[Finding]

    def tokens_per_second(self) -> dict[int, float]:
        """Threads -> the most tokens a second that the memory allows; empty without a bundle."""
        if not self.bundle_bytes:
            return {}
        return {threads: speed / self.bundle_bytes for threads, speed in self.bandwidth.items()}


def command(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle folder: also says how fast this machine could decode it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Tell what this machine has, which kernels are used, and why something is slow."""
    checkup = examine(bundle)
    if as_json:
        print(json.dumps({**asdict(checkup), "tokens_per_second": checkup.tokens_per_second()}, indent=2))
    else:
        show(checkup)


def examine(bundle: Path | None = None) -> Checkup:
    """Reads and measures; takes about a second.

    Raises:
        BundleError: `bundle` is not a bundle.
    """
    from isthmus.apps.bench.roofline import BUFFER_BYTES, read_bandwidth, steal_ticks, token_bytes
    from isthmus.engine import cpu_names
    from isthmus.split.bundle import Bundle
    from isthmus.split.fetch import cache_folder

    machine = read_machine()
    size = token_bytes(Bundle.open(bundle).manifest) if bundle else 0
    kernels = cpu_names()
    fallback = "onnxruntime" if find_spec("onnxruntime") else "none"
    chosen = (os.environ.get("ISTHMUS_CPU") or kernels[0]) if kernels else fallback
    stolen, ticks = steal_ticks()
    bandwidth = {
        threads: read_bandwidth(threads, buffer_bytes=size or BUFFER_BYTES)
        for threads in sorted({1, machine.threads, machine.cores})
    }
    stolen_now, ticks_now = steal_ticks()
    steal = (stolen_now - stolen) / max(1, ticks_now - ticks)
    cache = cache_folder()
    return Checkup(
        machine=machine,
        kernels=kernels,
        chosen=chosen,
        extras=installed_extras(),
        cache=str(cache),
        cache_bytes=sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
        bandwidth=bandwidth,
        bundle=str(bundle) if bundle else None,
        bundle_bytes=size,
        steal=steal,
        findings=findings(
            machine,
            native=bool(kernels),
            kernels=chosen,
            available=kernels,
            steal=steal,
            bundle_bytes=size,
            environment=os.environ,
        ),
    )


def show(checkup: Checkup) -> None:
    """Prints it for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for title, text in facts(checkup):
        table.add_row(title, escape(text))
    console = Console()
    console.print(table)
    console.print()
    if not checkup.findings:
        console.print("Nothing here slows isthmus down.", style="green")
        return
    console.print("What slows it down", style="bold yellow")
    for finding in checkup.findings:
        remedy = f" [dim]->[/] {escape(finding.remedy)}" if finding.remedy else ""
        console.print(f"  - {escape(finding.problem)}{remedy}", highlight=False, soft_wrap=True)


def facts(checkup: Checkup) -> list[tuple[str, str]]:
    """The lines of the report: title and text."""
    machine, memory = checkup.machine, checkup.machine.memory
    quota = f"{machine.quota_cpus:g} processors" if machine.quota_cpus is not None else "none"
    limit = _gib(memory.limit_bytes) if memory.limit_bytes is not None else "none"
    lines = [
        ("isthmus", f"{_version()} on Python {machine.python}, {machine.system} {machine.architecture}"),
        ("Processor", f"{machine.processor}: {machine.logical} processors, {machine.physical} cores"),
        (
            "",
            f"{machine.threads} for this process, container limit {quota}, governor {machine.governor or 'not shown'}",
        ),
        ("Instructions", ", ".join(machine.features) or "nothing that a kernel is made for"),
        ("Kernels", _kernels(checkup)),
        ("Compiler", machine.compiler or "none"),
        ("Memory", f"{_gib(memory.total_bytes)}, {_gib(memory.available_bytes)} free, container limit {limit}"),
        ("Reads", ", ".join(f"{_threads(t)} {speed / 1e9:.1f} GB/s" for t, speed in checkup.bandwidth.items())),
    ]
    if checkup.bundle_bytes:
        speeds = ", ".join(f"{_threads(t)} {speed:.0f} tok/s" for t, speed in checkup.tokens_per_second().items())
        lines.append(("Roofline", f"{checkup.bundle_bytes / 1e6:.1f} MB a token: at most {speeds}"))
    lines.append(("Models", f"{checkup.cache} ({checkup.cache_bytes / 1e6:.0f} MB)"))
    for extra, packages in checkup.extras.items():
        have = [f"{name} {version}" for name, version in packages.items() if version]
        lack = [name for name, version in packages.items() if not version]
        text = ", ".join(have) + (("; " if have else "") + f"not installed: {', '.join(lack)}" if lack else "")
        lines.append((f"Extra {extra}" if extra else "Packages", text))
    return lines


def _kernels(checkup: Checkup) -> str:
    if not checkup.kernels:
        return "none: not built" + ("; ONNX Runtime computes" if checkup.chosen == "onnxruntime" else "")
    return f"{checkup.chosen}, of {', '.join(checkup.kernels)} (ISTHMUS_CPU forces one)"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _version() -> Any:
    from importlib import metadata

    try:
        return metadata.version("isthmus")
    except metadata.PackageNotFoundError:
        return "(not installed)"
