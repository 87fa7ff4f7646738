"""A network of one's own from the command line: profiled, planned, cut, served, run, and on when the link is gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from tests.unit.test_split_onnx_measure import convolutions


def isthmus(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    with fresh_keys("tests") as folder:
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a network, inputs, what it gives, and the bundle that it was cut into."""
    made = tmp_path_factory.mktemp("network")
    onnx.save_model(convolutions(), str(made / "model.onnx"))
    x = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.savez(made / "given.npz", x=x)
    np.save(made / "given.npy", x)
    whole = ort.InferenceSession(str(made / "model.onnx"), providers=["CPUExecutionProvider"])
    np.save(made / "wanted.npy", whole.run(None, {"x": x})[0])
    for arguments in (
        ("profile", "model.onnx", "--shape", "x=1,3,32,32", "--seconds", "0.05", "--threads", "1"),
        ("plan", "model.onnx", "--link", "rtt=2,up=50,down=50"),
        ("split", "model.onnx", "--plan", "model.plan.json", "-o", "cut"),
    ):
        done = isthmus(*arguments, folder=made)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def cloud(folder: Path, keys: Path) -> Iterator[CloudProcess]:
    with CloudProcess(folder / "cut", keys, 1) as running:
        yield running


def right(path: Path, folder: Path) -> bool:
    with np.load(path) as found:
        return np.allclose(found["y"], np.load(folder / "wanted.npy"), atol=1e-5)


def test_it_runs_across_device_and_cloud(folder: Path, keys: Path, cloud: CloudProcess, tmp_path: Path) -> None:
    asked = ["--cloud", cloud.address, "--keys", str(keys), "--mode", "split", "-o", str(tmp_path / "out.npz")]
    done = isthmus("run", "cut", "--input", "given.npz", *asked, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("y  float32 [1, 16]") and "for the rest in the cloud" in done.stderr
    assert right(tmp_path / "out.npz", folder)


def test_many_runs_as_one_object(folder: Path, keys: Path, cloud: CloudProcess) -> None:
    asked = ["--cloud", cloud.address, "--keys", str(keys), "--times", "5", "--json"]
    done = isthmus("run", "cut", "--input", "given.npy", *asked, folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (
        told["codec"] == "raw"
        and told["times"] == 5
        and told["outputs"] == {"y": {"dtype": "float32", "shape": [1, 16]}}
    )


def test_it_runs_here_when_nobody_answers(folder: Path, keys: Path, tmp_path: Path) -> None:
    asked = ["--cloud", "127.0.0.1:9", "--keys", str(keys), "-o", str(tmp_path / "out.npz")]
    done = isthmus("run", "cut", "--input", "given.npz", *asked, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "went on alone" in done.stderr and right(tmp_path / "out.npz", folder)
    alone = isthmus("run", "cut", "--input", "given.npz", "-o", str(tmp_path / "alone.npz"), folder=folder)
    assert alone.returncode == 0 and "here, too" in alone.stderr and right(tmp_path / "alone.npz", folder)


def test_the_link_is_measured_and_planned_with(folder: Path, keys: Path, cloud: CloudProcess, tmp_path: Path) -> None:
    link = str(tmp_path / "link.json")
    done = isthmus("profile", "--remote", cloud.address, "--keys", str(keys), "-o", link, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "a round trip of" in done.stdout and "model, the second part:" in done.stdout
    told = json.loads(Path(link).read_text())
    assert 0 < told["rtt_ms"] < 500 and told["up_mbps"] > 1 and told["down_mbps"] > 1
    planned = isthmus("plan", "model.onnx", "--link", link, "-o", str(tmp_path / "plan.json"), folder=folder)
    assert planned.returncode == 0, planned.stderr


def test_three_machines(folder: Path, keys: Path, tmp_path: Path) -> None:
    """A device, an edge server that runs a part, and a cloud behind it; and on without that cloud."""
    shutil.copy(folder / "model.onnx", tmp_path / "model.onnx")
    profile = json.loads((folder / "model.profile.json").read_text())
    nodes = len(profile["nodes_ms"])

    def measured(name: str, cheap: range) -> str:
        """A machine on which some nodes take no time, and others long."""
        times = [0.01 if at in cheap else 50.0 for at in range(nodes)]
        (tmp_path / name).write_text(json.dumps(profile | {"nodes_ms": times, "whole_ms": sum(times)}))
        return name

    asked = ["--device", measured("device.json", range(3)), "--cloud", measured("cloud.json", range(7, nodes))]
    asked += ["--edge", measured("edge.json", range(3, 7)), "--edge-link", "rtt=1,up=100,down=100"]
    asked += ["--link", "rtt=2,up=50,down=50"]
    done = isthmus("plan", "model.onnx", *asked, "--no-measure", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "model.plan.json").read_text())
    row = plan["rows"][plan["best"]]
    assert (row["device"], row["edge"]) == ([0, 1, 2], [3, 4, 5, 6]) and "to the edge server, and after" in row["name"]
    done = isthmus("plan", "model.onnx", *asked, "-o", "measured.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = isthmus("split", "model.onnx", "--plan", "model.plan.json", "-o", "cut", folder=tmp_path)
    assert done.returncode == 0 and "on the edge server: isthmus serve cut --upstream" in done.stdout, done.stderr
    with (
        CloudProcess(tmp_path / "cut" / "edge", keys, 1) as cloud,
        CloudProcess(tmp_path / "cut", keys, 1, more=["--upstream", cloud.address]) as edge,
    ):
        run = ["run", "cut", "--input", str(folder / "given.npz"), "--cloud", edge.address, "--keys", str(keys)]
        run += ["--mode", "split", "-o", "out.npz"]
        done = isthmus(*run, folder=tmp_path)
        assert done.returncode == 0 and right(tmp_path / "out.npz", folder), done.stderr
        (tmp_path / "out.npz").unlink()
        cloud.kill()
        done = isthmus(*run, folder=tmp_path)
        assert done.returncode == 0 and right(tmp_path / "out.npz", folder), done.stderr
    done = isthmus("serve", str(folder / "cut"), "--upstream", "127.0.0.1:9", "--keys", str(keys), folder=tmp_path)
    assert done.returncode == 2 and "no bundle here was cut for three machines" in done.stderr


def test_a_plan_measures_this_machine_where_nobody_has(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path / "mine.onnx")
    done = isthmus("plan", "mine.onnx", "--cloud", "4", "--link", "rtt=2,up=50,down=50", folder=tmp_path)
    assert done.returncode == 2 and "open shape" in done.stderr and not (tmp_path / "mine.profile.json").exists()
    asked = ["--cloud", "4", "--link", "rtt=2,up=50,down=50", "--shape", "x=1,3,32,32"]
    done = isthmus("plan", "mine.onnx", *asked, folder=tmp_path)
    assert done.returncode == 0 and "measuring mine.onnx on this machine" in done.stderr, done.stderr
    assert (tmp_path / "mine.profile.json").exists() and (tmp_path / "mine.plan.json").exists()
    done = isthmus("plan", "mine.onnx", *asked, folder=tmp_path)
    assert done.returncode == 2
    assert "--shape has no effect: mine.profile.json has what the model was measured with" in done.stderr
    done = isthmus("plan", "mine.onnx", *asked[:4], "--device", "none.json", folder=tmp_path)
    assert done.returncode == 2 and "there is no profile none.json" in done.stderr


def test_a_cloud_without_a_bundle_lets_the_link_be_measured(keys: Path, tmp_path: Path) -> None:
    with CloudProcess(None, keys, 1) as running:
        done = isthmus("profile", "--remote", running.address, "--keys", str(keys), folder=tmp_path)
        assert done.returncode == 0 and (tmp_path / "link.json").exists(), done.stderr
        done = isthmus("run", "none", "--cloud", running.address, "--keys", str(keys), "--prompt", "x", folder=tmp_path)
        assert done.returncode == 2 and "serves no language model" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "nothing to measure"),
        (["model.onnx", "--remote", "127.0.0.1:9"], "a model has no effect with --remote"),
        (["--remote", "127.0.0.1:9", "--threads", "1"], "--threads has no effect with --remote"),
        (["model.onnx", "--no-keys"], "--no-keys has no effect without --remote"),
        (["--remote", "127.0.0.1:9", "--no-keys"], "answer"),
        (["--remote", "nowhere", "--no-keys"], "nowhere"),
        (["--remote", "127.0.0.1:9", "--no-keys", "-o", "absent/link.json"], "there is no folder absent"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder: Path, arguments: list[str], problem: str) -> None:
    done = isthmus("profile", *arguments, folder=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error:") and problem in done.stderr


def test_the_bundle_is_shown(folder: Path) -> None:
    done = isthmus("inspect", "cut", "--verify", folder=folder)
    assert done.returncode == 0, done.stderr
    for told in (
        "model, a network cut in two",
        "inputs   x float32 [any, 3, any, any]",
        "sent     as it is",
        "outputs  y",
        "all files here are",
    ):
        assert told in done.stdout
    assert json.loads(isthmus("inspect", "cut", "--json", folder=folder).stdout)["batches"] is True


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["cut"], "give it arrays: --input"),
        (["cut", "--input", "absent.npz"], "absent.npz cannot be read"),
        (["cut", "--input", "model.onnx"], "is no .npz or .npy file"),
        (["cut", "--input", "wanted.npy"], "the input 'x' is float32 [1, 16]"),
        (["cut", "--input", "given.npz", "--greedy"], "--greedy is for language models"),
        (["cut", "--input", "given.npz", "--prompt", "hi"], "--prompt is for language models"),
        (["cut", "--input", "given.npz", "--mode", "stream"], "the mode is 'stream'"),
        (["cut", "--input", "given.npz", "--mode", "split"], "needs a cloud"),
        (["cut", "--input", "given.npz", "-o", "absent/out.npz"], "name a .npz file in a folder"),
        (["cut", "--input", "given.npz", "-o", "out.txt"], "name a .npz file in a folder"),
        (["model.onnx", "--input", "given.npz"], "is a file, not a bundle"),
    ],
)
def test_what_cannot_be_run_is_one_line(folder: Path, arguments: list[str], problem: str) -> None:
    done = isthmus("run", *arguments, folder=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error:") and problem in done.stderr


def test_a_codec_is_planned_on_inputs_written_into_the_bundle_and_used(folder: Path, keys: Path) -> None:
    (folder / "inputs").mkdir()
    chance = np.random.default_rng(2)
    for at in range(4):
        np.savez(folder / "inputs" / f"{at}.npz", x=chance.standard_normal((1, 3, 32, 32)).astype(np.float32))
    asked = ["--link", "rtt=2,up=5,down=50", "--inputs", "inputs", "--min-agreement", "0.5", "--json", "--cloud", "1"]
    done = isthmus("plan", "model.onnx", *asked, "-o", "coded.json", folder=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    row = max((row for row in rows if row["agreement"] is not None), key=lambda row: row["up_bytes"])
    assert row["codec"].startswith(("int", "unit")) and row["agreement"] >= 0.5
    assert bool(row["transforms"]) == (row["codec"] == "unit")
    done = isthmus("split", "model.onnx", "--plan", "coded.json", "--way", row["name"], "-o", "coded", folder=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "coded" / "bundle.json").read_text())["codec"] == row["codec"]
    with CloudProcess(folder / "coded", keys, 1) as running:
        asked = ["--cloud", running.address, "--keys", str(keys), "--mode", "split", "--json"]
        sizes = []
        for codec in ([], ["--codec", "raw"]):
            done = isthmus("run", "coded", "--input", "given.npz", *asked, *codec, folder=folder)
            assert done.returncode == 0, done.stderr
            sizes.append(json.loads(done.stdout)["bytes_up"])
    assert sizes[0] < sizes[1] / 2


def test_a_picture_is_sent_in_place_of_what_is_made_of_it(folder: Path, keys: Path) -> None:
    (folder / "photos").mkdir()
    chance = np.random.default_rng(3)
    for at in range(4):
        small = chance.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(small).resize((50, 40)).save(folder / "photos" / f"{at}.png")
    (folder / "how.json").write_text('{"size": [32, 32], "resize": 32, "mean": [9, 9, 9], "std": [64, 64, 64]}')
    asked = ["--link", "rtt=2,up=5,down=50", "--inputs", "photos", "--preprocess", "how.json", "--json"]
    done = isthmus("plan", "model.onnx", *asked, "-o", "pictures.json", folder=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    number, row = next((at, row) for at, row in enumerate(rows, 1) if row["kind"] == "image")
    assert row["codec"].startswith("jpeg") and row["name"].startswith("the picture as JPEG ")
    cut = ("split", "model.onnx", "--plan", "pictures.json", "--way", str(number), "-o", "picture")
    done = isthmus(*cut, folder=folder)
    assert done.returncode == 0, done.stderr
    with CloudProcess(folder / "picture", keys, 1) as running:
        asked = ["--cloud", running.address, "--keys", str(keys), "--mode", "split", "--json"]
        done = isthmus("run", "picture", "--input", "photos/0.png", *asked, "-o", "there.npz", folder=folder)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["where"] == "cloud" and told["codec"] == row["codec"] and told["bytes_up"] < 32 * 32 * 3
    done = isthmus("run", "picture", "--input", "photos/0.png", "-o", "here.npz", folder=folder)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "there.npz") as there, np.load(folder / "here.npz") as here:
        assert there["y"].shape == here["y"].shape
    done = isthmus("run", "cut", "--input", "photos/0.png", folder=folder)
    assert done.returncode == 2 and "does not say what is done with pictures" in done.stderr
    done = isthmus("run", "picture", "--input", "given.npz", folder=folder)
    assert done.returncode == 2 and "has no input 'x'" in done.stderr


def test_a_codec_that_is_none_is_refused(folder: Path) -> None:
    done = isthmus("run", "cut", "--input", "given.npz", "--codec", "int9", folder=folder)
    assert done.returncode == 2 and "the codec is 'int9'" in done.stderr
    done = isthmus("plan", "model.onnx", "--link", "rtt=2,up=5,down=50", "--preprocess", "x.json", folder=folder)
    assert done.returncode == 2 and "no pictures" in done.stderr
