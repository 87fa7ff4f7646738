"""Profiles and plans from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.unit.test_split_onnx_measure import convolutions

SHAPE = ("--shape", "x=1,3,32,32", "--seconds", "0.05", "--threads", "1")


def isthmus(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and its profile."""
    made = tmp_path_factory.mktemp("plans")
    onnx.save_model(convolutions(), str(made / "model.onnx"))
    done = isthmus("profile", "model.onnx", *SHAPE, folder=made)
    assert done.returncode == 0, done.stderr
    assert "Conv" in done.stdout and "model.profile.json; next" in done.stdout
    return made


def refused(*arguments: str, folder: Path) -> str:
    done = isthmus(*arguments, folder=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error:")
    return done.stderr


def test_a_profile_and_a_link_give_a_plan(folder: Path) -> None:
    done = isthmus("plan", "model.onnx", "--link", "rtt=20,up=5,down=20", folder=folder)
    assert done.returncode == 0, done.stderr
    for told in ("all on the device", "the input to the cloud", "split after", "over a round trip of 20 ms"):
        assert told in done.stdout
    kept = json.loads((folder / "model.plan.json").read_text())
    assert kept["verdict"] in done.stdout.replace("\n", " ") and len(kept["rows"]) >= 3


def test_a_plan_takes_copied_profiles_traces_and_budgets(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "cloud.json"
    copied.write_bytes((folder / "model.profile.json").read_bytes())
    asked = ["--cloud", str(copied), "--link", "rtt=5,trace=synthetic", "--slo-ms", "5000", "--p", "90", "--json"]
    asked += ["--memory-mb", "1", "--energy-j", "9", "--device-watts", "2", "-o", str(tmp_path / "plan.json")]
    done = isthmus("plan", "model.onnx", *asked, folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "plan.json").read_text())
    assert told["percentile"] == 90.0 and all(row["tail_ms"] > 0 for row in told["rows"])


def test_a_plan_is_drawn(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    asked = ["--link", "rtt=5,up=2,down=8", "--plot", str(picture), "-o", str(tmp_path / "plan.json")]
    done = isthmus("plan", "model.onnx", *asked, folder=folder)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--link", "rtt=1,rate=0"], "nothing arrives"),
        (["--link", "fast"], "says nothing of a link"),
        (["--link", "rtt=1,rate=1", "--p", "100"], "the percentile is 100"),
        (["--link", "rtt=1,rate=1", "--energy-j", "1"], "no watts"),
        (["--link", "rtt=1,rate=1", "--cloud", "absent.json"], "absent.json"),
        (["--link", "rtt=1,rate=1", "--device", "absent.json"], "isthmus profile model.onnx"),
        (["--link", "rtt=1,rate=1", "--slo-ms", "0.0001"], "0.0001 wanted"),
        (["--link", "rtt=1,rate=1", "--cloud", ""], "--cloud is empty"),
        (["--link", "rtt=1,rate=1", "--memory-mb", "nan"], "--memory-mb is nan"),
        (["--link", "rtt=1,rate=1", "--memory-mb", "-5"], "MB -5 cannot be met: 0 is the least, 5 more"),
        (["--link", "rtt=1,rate=1", "-o", "absent/plan.json"], "there is no folder absent"),
        (["--link", "rtt=1,rate=1", "--load", "2"], "of the cloud's time"),
        (["--link", "rtt=1,rate=1", "--plot", "absent/plan.png"], "there is no folder absent"),
    ],
)
def test_what_no_plan_can_be_made_of_is_one_line(folder: Path, arguments: list[str], problem: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert problem in refused("plan", "model.onnx", *arguments, folder=folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_plan_cuts_a_model_into_two(folder: Path, tmp_path: Path) -> None:
    plan, cut = tmp_path / "plan.json", tmp_path / "cut"
    done = isthmus("plan", "model.onnx", "--link", "rtt=5,up=2,down=8", "-o", str(plan), folder=folder)
    assert done.returncode == 0, done.stderr
    split = ["split", "model.onnx", "--plan", str(plan), "-o", str(cut)]
    done = isthmus(*split, folder=folder)
    assert done.returncode == 0 and "what travels:" in done.stdout, done
    assert (cut / "device" / "model.onnx").is_file() and (cut / "cloud" / "model.onnx").is_file()
    assert "exists already" in refused(*split, folder=folder)
    assert "--format means nothing" in refused(*split, "--force", "--format", "q8", folder=folder)
    assert "--plan means nothing" in refused("split", "smollm2", "--plan", str(plan), "-o", "x", folder=folder)
    assert "needs a plan" in refused("split", "model.onnx", "-o", str(tmp_path / "other"), folder=folder)
    rows = json.loads(plan.read_text())["rows"]
    whole = next(at for at, row in enumerate(rows, 1) if row["kind"] == "device")
    for way, said in (("x", "'x'"), ("0", "'0'"), (str(len(rows) + 1), f"'{len(rows) + 1}'"), (str(whole), "all on")):
        assert "has no way " in (line := refused(*split, "--way", way, "--force", folder=folder)) and said in line
    assert "no plan" in refused("split", "model.onnx", "--plan", "model.onnx", "-o", str(tmp_path / "x"), folder=folder)


def test_a_profile_of_an_older_model_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = convolutions()
    changed.graph.doc_string = "another"
    onnx.save_model(changed, str(tmp_path / "model.onnx"))
    asked = ["--device", str(folder / "model.profile.json"), "--link", "rtt=1,rate=1"]
    assert "another version of this model" in refused("plan", "model.onnx", *asked, folder=tmp_path)


def test_what_cannot_be_profiled_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("hello")
    assert "no ONNX file" in refused("profile", "no.onnx", folder=tmp_path)
    assert "absent.onnx" in refused("profile", "absent.onnx", folder=tmp_path)
    model = convolutions()
    onnx.save_model(model, str(tmp_path / "model.onnx"))
    assert "--shape x=" in refused("profile", "model.onnx", folder=tmp_path)
    for shape, problem in (("x", "--shape is"), ("x=1,3", "refuses its inputs"), ("z=1", "no input 'z'")):
        assert problem in refused("profile", "model.onnx", "--shape", shape, "--seconds", "0.05", folder=tmp_path)
    np.savez(tmp_path / "in.npz", z=np.ones(3, np.float32))
    assert "no input 'z'" in refused("profile", "model.onnx", "--input", "in.npz", folder=tmp_path)
    assert "there is no folder" in refused("profile", "model.onnx", "-o", "absent/x.json", folder=tmp_path)
    model.graph.node[0].op_type = "Frobnicate"
    onnx.save_model(model, str(tmp_path / "odd.onnx"))
    assert "Frobnicate" in refused("profile", "odd.onnx", *SHAPE, folder=tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_nothing_is_imported_from_where_the_model_lies(tmp_path: Path) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    for name in ("onnx", "numpy", "scipy", "json"):
        (tmp_path / f"{name}.py").write_text("open('poisoned', 'w')\nraise SystemExit(9)\n")
    command = [str(Path(sys.executable).parent / "isthmus"), "profile", "model.onnx", *SHAPE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not (tmp_path / "poisoned").exists(), done


def test_a_model_whose_weights_lie_beside_it_is_planned(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 64]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "beside", ends[:1], ends[1:], [weight]), ir_version=9)
    model.opset_import[0].version = 17
    path = str(tmp_path / "model.onnx")
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert isthmus("profile", "model.onnx", "--seconds", "0.05", folder=tmp_path).returncode == 0
    done = isthmus("plan", "model.onnx", "--link", "rtt=1,rate=100", folder=tmp_path)
    assert done.returncode == 0 and "split after h" in done.stdout, done
    (tmp_path / "w.bin").write_bytes(b"short")
    assert "truncated" in refused("plan", "model.onnx", "--link", "rtt=1,rate=100", folder=tmp_path)
