"""What this machine is: facts read from the kernel and from the installation, nothing measured and nothing judged."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# The instruction sets that some kernel of the engine uses, as the kernel's cpuinfo spells them.
FEATURES: Mapping[str, str] = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512F",
    "avx512bw": "AVX512BW",
    "avx512vl": "AVX512VL",
    "avx512_vnni": "AVX512-VNNI",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "NEON i8mm",
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; `limit_bytes` is the control group's, None where there is none."""

    total_bytes: int
    available_bytes: int
    swap_used_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts.

    Attributes:
        threads: logical processors that this process may run on.
        logical, physical: processors and cores of the whole machine.
        quota_cpus: processors' worth of time that the control group grants, None for no limit.
        governor: the frequency governor of the first processor, None where the kernel shows none.
        load_1m: mean number of running processes over the last minute.
        compiler: first line of what the C compiler says of itself, None without one.
    """

    system: str
    architecture: str
    python: str
    processor: str
    features: tuple[str, ...]
    threads: int
    logical: int
    physical: int
    quota_cpus: float | None
    governor: str | None
    load_1m: float
    memory: Memory
    compiler: str | None

    @property
    def cores(self) -> int:
        """Cores that this process may keep busy, as far as affinity and quota tell."""
        allowed = self.threads if self.quota_cpus is None else min(self.threads, math.ceil(self.quota_cpus))
        return max(1, min(self.physical, allowed))


def read_machine(root: Path = Path("/")) -> Machine:
    """Reads the machine. `root` is where proc/ and sys/ lie; what is not there is left empty, never an error."""
    cpuinfo = _text(root / "proc/cpuinfo")
    logical = max(1, len(re.findall(r"^processor\s*:", cpuinfo, re.M)) or os.cpu_count() or 1)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)[:1]).split())
    name = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", cpuinfo, re.M)
    cores = set(re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", cpuinfo, re.M | re.S))
    return Machine(
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        architecture=platform.machine(),
        python=platform.python_version(),
        processor=name[1].strip() if name else platform.processor() or "unknown processor",
        features=tuple(title for flag, title in FEATURES.items() if flag in flags),
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        logical=logical,
        physical=len(cores) or logical,
        quota_cpus=_quota_cpus(root),
        governor=_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        load_1m=float((_text(root / "proc/loadavg").split() or ["0"])[0]),
        memory=_memory(root),
        compiler=_compiler(),
    )


def installed_extras(distribution: str = "isthmus") -> dict[str, dict[str, str | None]]:
    """Extra -> package -> installed version or None; the base is named "". Empty when isthmus is not installed."""
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        if package and package[0] != distribution:
            extras.setdefault(extra[1] if extra else "", {})[package[0]] = _version(package[0])
    return extras


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _memory(root: Path) -> Memory:
    pairs = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    kib = {key: int(value) for key, value in pairs}
    limits = [int(t) for t in _cgroup(root, "memory", "memory.max", "memory.limit_in_bytes") if t.isdigit()]
    limit = min(limits, default=1 << 62)
    total = kib.get("MemTotal", 0) << 10
    return Memory(
        total_bytes=total,
        available_bytes=kib.get("MemAvailable", 0) << 10,
        swap_used_bytes=(kib.get("SwapTotal", 0) - kib.get("SwapFree", 0)) << 10,
        limit_bytes=limit if limit < (total or 1 << 60) else None,
    )


def _quota_cpus(root: Path) -> float | None:
    quotas = []
    for text in _cgroup(root, "cpu", "cpu.max", ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    spent = _cgroup(root, "cpu", "", "cpu.cfs_quota_us")
    periods = _cgroup(root, "cpu", "", "cpu.cfs_period_us")
    quotas += [int(q) / int(p) for q, p in zip(spent, periods, strict=False) if q.isdigit() and p.isdigit() and int(p)]
    return min(quotas, default=None)


def _cgroup(root: Path, controller: str, v2: str, v1: str) -> list[str]:
    """What a control file says for this process's group and every group above it, in both layouts."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        if not names and v2:
            base, file = root / "sys/fs/cgroup", v2
        elif controller in names.split(",") and v1:
            base, file = root / "sys/fs/cgroup" / controller, v1
        else:
            continue
        folder = base / group.strip().strip("/")
        for level in (folder, *folder.parents):
            if level == base or base in level.parents:
                found.append(_text(level / file).strip())
    return found


def _compiler() -> str | None:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return said.splitlines()[0] if said else name
    return None
