"""The doctor: machines written down as the kernel shows them, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.apps.bench.machine import Machine, read_machine
from isthmus.apps.bench.roofline import read_bandwidth, steal_ticks, token_bytes
from isthmus.apps.cli.advice import findings
from isthmus.apps.cli.main import main
from isthmus.engine.config import DecoderConfig
from isthmus.split.manifest import EMBEDDING, HEAD, FileEntry, Manifest, TokenizerEntry

X86 = """processor\t: 0
model name\t: A Server CPU @ 2.50GHz
physical id\t: 0
core id\t: 0
flags\t\t: fpu avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni

processor\t: 1
model name\t: A Server CPU @ 2.50GHz
physical id\t: 0
core id\t: 0
flags\t\t: fpu avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\nFeatures\t: fp asimd asimddp\n"


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_x86_machine_with_a_control_group(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            "proc/cpuinfo": X86,
            "proc/meminfo": "MemTotal: 4096000 kB\nMemAvailable: 2048000 kB\nSwapTotal: 1000 kB\nSwapFree: 400 kB\n",
            "proc/loadavg": "1.50 1.00 0.50 1/100 42\n",
            "proc/self/cgroup": "0::/user/box\n",
            "sys/fs/cgroup/user/box/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "1073741824\n",
            "sys/fs/cgroup/user/box/cpu.max": "50000 100000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        },
    )
    machine = read_machine(root)
    assert machine.processor == "A Server CPU @ 2.50GHz"
    assert (machine.logical, machine.physical) == (2, 1)
    assert "AVX512-VNNI" in machine.features
    assert machine.quota_cpus == 0.5
    assert machine.governor == "powersave"
    assert machine.load_1m == 1.5
    assert machine.memory.limit_bytes == 1 << 30
    assert machine.memory.swap_used_bytes == 600 << 10


def test_first_layout_of_control_groups(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            "proc/cpuinfo": X86,
            "proc/meminfo": "MemTotal: 4096000 kB\n",
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    machine = read_machine(root)
    assert machine.memory.limit_bytes == 512 << 20
    assert machine.quota_cpus == 1.5


def test_arm_machine(tmp_path: Path) -> None:
    machine = read_machine(files(tmp_path, {"proc/cpuinfo": ARM}))
    assert machine.features == ("NEON", "NEON dot product")
    assert replace(machine, threads=1).cores == 1 and replace(machine, threads=8).cores == 2
    assert machine.logical == machine.physical == 2


def test_a_machine_that_shows_nothing(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert machine.features == ()
    assert machine.quota_cpus is None
    assert machine.memory.limit_bytes is None
    assert steal_ticks(tmp_path) == (0, 0)


@pytest.fixture
def fine() -> Machine:
    """A machine with nothing to complain of."""
    machine = read_machine()
    return replace(
        machine,
        architecture="x86_64",
        features=("AVX2", "AVX512-VNNI"),
        threads=2,
        logical=2,
        physical=2,
        quota_cpus=None,
        governor="performance",
        load_1m=0.0,
        memory=replace(machine.memory, available_bytes=8 << 30, limit_bytes=None, swap_used_bytes=0),
        compiler="cc 12",
    )


def problems(machine: Machine, **said: object) -> str:
    settings: dict[str, object] = {"native": True, "kernels": "avx512-vnni", **said}
    return " | ".join(f.problem for f in findings(machine, **settings))  # type: ignore[arg-type]


def test_a_good_machine_is_left_alone(fine: Machine) -> None:
    assert findings(fine, native=True, kernels="avx512-vnni") == []


def test_each_trouble_is_named(fine: Machine) -> None:
    assert "not built" in problems(fine, native=False)
    assert "no VNNI" in problems(replace(fine, features=("AVX2",)))
    assert "plain C" in problems(replace(fine, features=()))
    assert "powersave" in problems(replace(fine, governor="powersave"))
    assert "other work" in problems(replace(fine, load_1m=1.8))
    assert "swapped" in problems(replace(fine, memory=replace(fine.memory, swap_used_bytes=1 << 30)))
    assert "grants 1 of 2" in problems(replace(fine, quota_cpus=1.0))
    assert "share 1 cores" in problems(replace(fine, physical=1))
    assert "ISTHMUS_CPU=plain" in problems(fine, environment={"ISTHMUS_CPU": "plain"})
    bogus = problems(fine, environment={"ISTHMUS_CPU": "mmx"}, available=("avx2", "plain"))
    assert "ISTHMUS_CPU=mmx names no kernels" in bogus
    assert "host took 20%" in problems(fine, steal=0.2)
    assert "9120 MiB" not in problems(fine, bundle_bytes=100 << 20)
    assert "wants about 9120 MiB" in problems(fine, bundle_bytes=9000 << 20)
    arm = replace(fine, architecture="aarch64", features=("NEON",))
    assert "NEON dot product" in problems(arm)
    build = findings(replace(fine, compiler=None), native=False, kernels="onnxruntime")[0]
    assert "install a C compiler" in build.remedy
    nothing = findings(fine, native=False, kernels="none")[0]
    assert "nothing will run" in nothing.problem and "pip install onnxruntime" in nothing.remedy


def test_bandwidth_is_measured() -> None:
    assert read_bandwidth(2, buffer_bytes=1 << 20, repeats=1) > 0


def test_token_reads_all_but_a_separate_embedding() -> None:
    config = DecoderConfig("llama", 1, 4, 1, 1, 4, 4, 8, 16, 1e-5, (1.0, 0.5))
    names = {
        EMBEDDING: 1000,
        HEAD: 300,
        "weights/norm.safetensors": 20,
        "weights/layer-000.safetensors": 4,
        "tokenizer.json": 9,
    }
    entries = {name: FileEntry(size, "0" * 64) for name, size in names.items()}
    manifest = Manifest("m", "0" * 32, config, "keep", TokenizerEntry(), entries)
    assert token_bytes(manifest) == 324
    tied = {name: entry for name, entry in entries.items() if name != HEAD}
    assert token_bytes(Manifest("m", "0" * 32, config, "keep", TokenizerEntry(), tied)) == 1024


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["threads"] >= 1
    assert report["chosen"] in (*report["kernels"], "onnxruntime")
    assert all(speed > 0 for speed in report["bandwidth"].values())


@pytest.mark.parametrize("installed", [True, False])
def test_doctor_says_what_computes_without_the_native_engine(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isthmus.apps.cli import doctor

    monkeypatch.setattr("isthmus.engine.binding.cpu_names", tuple)
    monkeypatch.setattr(doctor, "find_spec", lambda name: installed or None)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert ("ONNX Runtime computes" in shown) is installed
    assert ("nothing will run" in shown) is not installed


def test_doctor_speaks_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Processor", "Kernels", "Memory", "Compiler", "Models"))


def test_doctor_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
