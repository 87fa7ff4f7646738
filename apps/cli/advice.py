"""Why a machine is slower than it could be: a pure function from facts to findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.apps.bench.machine import Machine

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that costs speed or memory, and what to do about it; `remedy` is empty when nothing can be done."""

    problem: str
    remedy: str = ""


def findings(
    machine: Machine,
    *,
    native: bool,
    kernels: str,
    available: Sequence[str] = (),
    steal: float = 0.0,
    bundle_bytes: int = 0,
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """What slows this machine down, the worst first.

    Args:
        native: whether the native engine is built.
        kernels: name of the kernels that the engine chose; "none" when nothing here can compute.
        available: names of all that it can run here.
        steal: share of processor time that the host took away while measuring, 0..1.
        bundle_bytes: bytes of the weights that are to be run, 0 when no bundle was named.
        environment: environment variables; `ISTHMUS_CPU` forces kernels.
    """
    found: list[Finding] = []
    if not native:
        build = "install isthmus again" if machine.compiler else "install a C compiler, then isthmus again"
        if kernels == "none":
            problem = "neither the native engine nor ONNX Runtime is here, so nothing will run"
            found.append(Finding(problem, f"{build}; or: pip install onnxruntime"))
        else:
            found.append(Finding("the native engine is not built, ONNX Runtime computes", build))
    memory = machine.memory
    room = min(memory.available_bytes, memory.limit_bytes or memory.available_bytes)
    if bundle_bytes and room and bundle_bytes + 120 * MIB > room:
        need, have = bundle_bytes // MIB + 120, room // MIB
        found.append(
            Finding(f"the bundle wants about {need} MiB, {have} MiB are free", "hold fewer layers, or free memory")
        )
    if memory.swap_used_bytes > 64 * MIB:
        swapped = memory.swap_used_bytes // MIB
        found.append(Finding(f"{swapped} MiB are swapped out", "close programs: weights read from swap are far slower"))
    if machine.load_1m > 0.5 * machine.logical:
        found.append(
            Finding(
                f"other work is running (load {machine.load_1m:.1f} on {machine.logical} processors)", "wait for it"
            )
        )
    if steal > 0.02:
        found.append(
            Finding(f"the host took {steal:.0%} of the processor time while measuring", "compare within one run")
        )
    if machine.quota_cpus is not None and machine.quota_cpus < machine.threads:
        found.append(
            Finding(
                f"the container grants {machine.quota_cpus:g} of {machine.threads} processors",
                f"use --threads {max(1, int(machine.quota_cpus))}, or raise the limit",
            )
        )
    if machine.threads > machine.physical:
        found.append(
            Finding(
                f"{machine.threads} hardware threads share {machine.physical} cores",
                f"try --threads {machine.physical}: decoding waits for memory, not for arithmetic",
            )
        )
    if machine.governor in ("powersave", "conservative"):
        found.append(
            Finding(f"the frequency governor is {machine.governor}", "cpupower frequency-set --governor performance")
        )
    forced = (environment or {}).get("ISTHMUS_CPU")
    if forced and available and forced not in available:
        problem = f"ISTHMUS_CPU={forced} names no kernels that this machine runs, so nothing will run"
        found.append(Finding(problem, f"unset it, or choose among {', '.join(available)}"))
    elif forced:
        found.append(Finding(f"ISTHMUS_CPU={forced} forces the kernels ({kernels})", "unset it for the fastest ones"))
    if machine.architecture in ("x86_64", "AMD64"):
        if "AVX2" not in machine.features:
            found.append(Finding("the processor has no AVX2, so plain C computes"))
        elif not {"AVX512-VNNI", "AVX-VNNI"} & set(machine.features):
            found.append(Finding("the processor has no VNNI: integer dot products take three instructions, not one"))
    elif (
        machine.architecture in ("aarch64", "arm64") and machine.features and "NEON dot product" not in machine.features
    ):
        found.append(Finding("the processor has no NEON dot product: 4-bit weights are computed more slowly"))
    return found
