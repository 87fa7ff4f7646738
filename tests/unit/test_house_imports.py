"""What an import costs and what a package shows: heavy modules load only where they are used."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "numpy",
    "zmq",
    "msgspec",
    "tokenizers",
    "typer",
    "rich",
    "gguf",
}

# What users may import. A new name is a promise: add it here on purpose.
EXPORTS: dict[str, set[str]] = {
    "protocol": {
        *("AllowList", "DeviceKeys", "IsthmusError", "KeyPair", "Link", "LinkError", "LinkLimits", "ProtocolError"),
        *("Refused", "connect"),
    },
    "quant": {"FORMATS", "PackedMatrix", "dequantize", "pack", "quantize", "unpack", "view"},
    "engine": {
        *("GREEDY", "DecoderConfig", "Expert", "ExpertSource", "ExpertsConfig", "KvConfig", "Numerics"),
        *("Part", "Rows", "Sampling", "Sequence", "StepResult", "Want", "WeightSource", "cpu_names", "open_part"),
    },
    "split": {"Bundle", "Checkpoint", "Tokenizer", "open_checkpoint", "write_bundle"},
    "edge": {
        *("AsyncDevice", "CutOff", "Device", "GraphDevice", "GraphStats", "Rollback", "Stats", "Timeouts", "Token"),
        *("ExpertReport", "ExpertSettings", "Sampling"),
        "fetch_part",
    },
    "cloud": set(),
    "apps": set(),
    "apps.cli": set(),
}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    program = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("from isthmus.apps.cli.main import main\nmain(['--help'])") & HEAVY == set()


def test_edge_loads_neither_torch_nor_onnx() -> None:
    code = "import isthmus.edge\nfor name in isthmus.edge.__all__: getattr(isthmus.edge, name)"
    assert loaded_by(code) & {"torch", "transformers", "onnx", "onnxruntime", "gguf", "pydantic"} == set()


@pytest.mark.parametrize("package", ["protocol", "quant", "engine", "split", "edge", "cloud", "apps"])
def test_package_is_lazy(package: str) -> None:
    assert loaded_by(f"import isthmus.{package}") & HEAVY == set()


@pytest.mark.parametrize("package", sorted(EXPORTS))
def test_exports_are_the_promised_ones(package: str) -> None:
    module = importlib.import_module(f"isthmus.{package}")
    assert set(module.__all__) == EXPORTS[package]
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize("package", sorted(EXPORTS))
def test_no_export_hides_behind_a_module(package: str) -> None:
    """Importing a submodule binds its name in the package, over an export of the same name."""
    modules = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")}
    assert EXPORTS[package] & modules == set()
