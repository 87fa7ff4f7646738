"""Early exits of a real network: what a plan says of them, and what they do on crops that no plan has seen.

EfficientNet-Lite0 gets two exits, each the mean over positions behind a block, a linear map and a softmax. They are
trained on crops of 20 photographs to say what the network says: exits for a camera that sees known scenes, as no
package brings enough pictures for exits of a thousand classes. Plans are made with 64 other crops of the same
photographs, and judged on 136 more: scenes are the same. A device is declared to be four times as slow as this machine;
the cloud runs on it.

usage: python benchmarks/early.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import onnx
from efficientnet import SIZE
from networks import PREPROCESS, crops, efficientnet, photographs
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from planner import LINKS, PAUSE_S, SLOW
from record import Cell, Record

from isthmus.apps.bench.calm import Calm
from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.edge import Timeouts
from isthmus.edge.graph import GraphDevice
from isthmus.split import onnx_measure, onnx_plan
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_writer import write_graph
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_stages import needed
from isthmus.split.pictures import Picture, Preprocess
from isthmus.split.plan import Plan, Row
from isthmus.split.profile import Profile

EXITS = {"early7": "_blocks.7.sum", "early10": "_blocks.10.sum"}  # the tensors behind which they stand
CONFIDENCE, LEAST = 0.9, 0.99
LEARNT, TRIED = 60, 64  # crops of each photograph that exits learn from; crops that a plan is made with
STEPS, DECAY = 400, 1e-3
MEASURED = 60  # inputs of each way
OVER = ("LAN, 2 ms, 200 Mbit/s", "Wi-Fi, 10 ms, 40 Mbit/s", "LTE, 40 ms, 8 Mbit/s")
CLASSES = 1000
NOTE = (
    "The best way with exits, and the best without. An input's average; what leaves and what stays is counted on other "
    "crops of the same photographs."
)
UNSEEN = -30.0  # the logit of a class that no crop has


def main() -> int:
    """Trains, plans and measures, and writes results/early.json."""
    how = msgspec.convert(PREPROCESS, Preprocess)
    shown = photographs()
    chance = np.random.default_rng(1)
    order = chance.permutation(len(shown))
    tried, others = ([shown[at] for at in part] for part in (order[:TRIED], order[TRIED:]))
    settings = {"confidence": CONFIDENCE, "learnt from": f"{LEARNT} crops of each photograph", "device slow-down": SLOW}
    record = Record("early", settings | {"plans made with": len(tried), "judged on": len(others), "threads": 1})
    rows: list[list[Cell]] = []
    with TemporaryDirectory(prefix="isthmus-early-") as folder, fresh_keys() as keys:
        stand = Stand(Path(folder), keys, how, tried, others)
        for link in OVER:
            plan = stand.planned(LINKS[link])
            best = min((row for row in plan.rows if row.leaves and not row.fails), key=lambda row: row.ms, default=None)
            plain = min((row for row in plan.rows if not row.leaves and not row.fails), key=lambda row: row.ms)
            recommended = plan.rows[plan.best]
            for row in filter(None, (best, plain)):
                left, stays, took_ms = stand.took(plan, row, LINKS[link])
                share = 1.0 - row.goes_on
                chosen = "recommended" if row is recommended else ""
                off = abs(row.ms - took_ms) / took_ms
                rows.append([link, row.name, chosen, share, left, stays, row.ms, took_ms, off])
                print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
                if row is best:
                    record.figure(f"{link}/leave, planned", share, "of inputs")
                    record.figure(f"{link}/leave, measured", left, "of inputs")
                    record.figure(f"{link}/answers that stay", stays, "share", target=LEAST)
                    record.figure(f"{link}/off by", off, "of the measured", target=0.2, at_most=True)
                else:
                    record.figure(f"{link}/without exits", took_ms, "ms")
            if best is not None:
                record.figure(f"{link}/with exits", float(rows[-2][7] or 0), "ms")
    columns = ["link", "way", "", "leave, planned", "leave, measured", "answers that stay", "planned, ms"]
    record.table("early", [*columns, "measured, ms", "off by"], rows, note=NOTE)
    record.write()
    return 0


class Stand:
    """The network with its exits, profiled.

    Args:
        work: a folder.
        tried, others: pictures that plans are made with, and judged on.
    """

    def __init__(
        self, work: Path, keys: Path, how: Preprocess, tried: Sequence[Picture], others: Sequence[Picture]
    ) -> None:
        self._work, self._keys, self._calm = work, keys, Calm()
        self._how, self._others = how, others
        self._path = work / "with-exits.onnx"
        onnx.save_model(with_exits(how), str(self._path))
        self._whole = onnx_measure.session(onnx.load(str(self._path)), self._path, 0)
        (work / "tried").mkdir()
        for at, picture in enumerate(tried):
            Image.fromarray(picture).save(work / "tried" / f"{at:02}.png")
        (work / "how.json").write_text(json.dumps(PREPROCESS | {"resize": SIZE}))
        self._cuts = 0

    def planned(self, profile: LinkProfile) -> Plan:
        """The plan over a link."""
        self._calm.wait(30.0)
        cloud = Profile.of(onnx_measure.measure(str(self._path), 1, {}, 3.0), "this", "this")
        slower: dict[str, Any] = {name: SLOW * getattr(cloud, name) for name in ("whole_ms", "first_ms")}
        slower["nodes_ms"] = tuple(SLOW * ms for ms in cloud.nodes_ms)
        here, there = self._work / "device.json", self._work / "cloud.json"
        cloud.save(there)
        msgspec.structs.replace(cloud, **slower).save(here)
        assert profile.rate_up_bps is not None and profile.rate_down_bps is not None
        link = f"rtt={profile.rtt_ms},up={profile.rate_up_bps / 1e6},down={profile.rate_down_bps / 1e6}"
        asked = {"folder": str(self._work / "tried"), "preprocess": str(self._work / "how.json"), "agreement": LEAST}
        asked["exits"] = dict.fromkeys(EXITS, CONFIDENCE)
        return msgspec.convert(onnx_plan.plan(str(self._path), str(here), str(there), link, asked), Plan)

    def took(self, plan: Plan, row: Row, profile: LinkProfile) -> tuple[float, float, float]:
        """The share of inputs that left at an exit, the share of answers that stayed, and the mean ms of an input."""
        bundle = self._written(row, plan.preprocess)
        self._calm.wait(30.0)
        left, stays, took = list[bool](), list[bool](), list[float]()
        given = GraphBundle.open(bundle).manifest.preprocess or self._how  # of a way that sends pictures, less
        inputs = [given.array(one) for one in self._others]
        timeouts = Timeouts(connect_ms=60_000, give_up_ms=60_000)
        with CloudProcess(bundle, self._keys, 1) as cloud, Relay(cloud.address, profile) as relay:
            mode: Any = "local" if row.kind == "device" else "split"
            address = None if mode == "local" else relay.address
            settings: dict[str, Any] = {"mode": mode, "keys": self._keys, "threads": 1, "slow_down": SLOW}
            with GraphDevice(bundle, address, timeouts=timeouts, **settings) as device:
                name = device.bundle.manifest.inputs[0].name
                for one in inputs[:3]:
                    device.infer({name: one})
                for one in inputs[:MEASURED]:
                    began = time.perf_counter()
                    device.infer({name: one})
                    took.append((time.perf_counter() - began) * 1e3)
                    time.sleep(PAUSE_S)
                for one, picture in zip(inputs, self._others, strict=True):
                    found = device.infer({name: one})
                    exit = device.stats.exit
                    whole = self._whole.run(["y"], {"x": self._how.array(picture)})[0]
                    left.append(bool(exit))
                    stays.append(bool(found[exit or "y"].argmax() == whole.argmax()))
        return statistics.fmean(left), statistics.fmean(stays), statistics.fmean(took)

    def _written(self, row: Row, preprocess: Preprocess | None) -> Path:
        """A way as a bundle; of all on the device, one whose cloud has what follows the last exit."""
        self._cuts += 1
        path, device = self._work / f"cut-{self._cuts}", row.device
        if row.kind == "device":
            device = ()
        exits = [msgspec.to_builtins(one.exit) for one in row.leaves]
        if exits and not device:
            graph = OnnxGraph(read_model(self._path))
            device = tuple(sorted(set[int]().union(*(needed(graph, one.exit.output) for one in row.leaves))))
        more: dict[str, Any] = {"codec": row.codec if row.leaves or row.kind == "split" else "", "exits": exits}
        if more["codec"] == "as it is":
            more["codec"] = ""
        if row.kind == "image":
            more |= {"codec": row.codec, "preprocess": msgspec.to_builtins(preprocess)}
        if row.transforms:
            more["transforms"] = msgspec.to_builtins(row.transforms)
        write_graph(str(self._path), "", device, str(path), **more)
        return path


def with_exits(how: Preprocess) -> onnx.ModelProto:
    """The network with exits that were trained on crops of known scenes."""
    model = onnx.load(str(efficientnet().path))
    learnt = crops(LEARNT, seed=100)
    inputs = [how.array(one) for one in learnt]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    for tensor in EXITS.values():
        tapped.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    session = onnx_measure.session(tapped, efficientnet().path, 0)
    names = ["y", *EXITS.values()]
    found = [session.run(names, {"x": one}) for one in inputs]
    said = np.array([int(one[0].argmax()) for one in found])
    for at, (exit, tensor) in enumerate(EXITS.items(), start=1):
        means = np.stack([one[at].mean(axis=(2, 3))[0] for one in found])
        _add(model, exit, tensor, *trained(means, said))
    last, *early = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([*early, last])  # the last is what exits stand for
    onnx.checker.check_model(model, full_check=True)
    return model


def trained(means: Any, said: Any) -> tuple[Any, Any]:
    """A linear map [channels, classes] and its offsets, by multinomial regression with weight decay."""
    import torch

    torch.manual_seed(0)
    classes, labels = np.unique(said, return_inverse=True)
    center, scale = means.mean(axis=0), means.std(axis=0) + 1e-6
    inputs = torch.from_numpy(((means - center) / scale).astype(np.float32))
    weight = torch.zeros(means.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(inputs @ weight + bias, torch.from_numpy(labels))
        optimizer.zero_grad()
        (loss + DECAY * weight.square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    whole = np.zeros((means.shape[1], CLASSES), np.float32)
    offsets = np.full(CLASSES, UNSEEN, np.float32)
    whole[:, classes] = weight.detach().numpy() / scale[:, None]
    offsets[classes] = bias.detach().numpy() - center @ whole[:, classes]
    return whole, offsets


def _add(model: onnx.ModelProto, exit: str, tensor: str, weight: Any, bias: Any) -> None:
    """Puts an exit behind a tensor."""
    graph = model.graph
    for what, value in (("weight", weight), ("bias", bias)):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), f"{exit}.{what}"))
    graph.node.extend(
        [
            helper.make_node("GlobalAveragePool", [tensor], [f"{exit}.pooled"]),
            helper.make_node("Flatten", [f"{exit}.pooled"], [f"{exit}.flat"]),
            helper.make_node("Gemm", [f"{exit}.flat", f"{exit}.weight", f"{exit}.bias"], [f"{exit}.logits"]),
            helper.make_node("Softmax", [f"{exit}.logits"], [exit], axis=1),
        ]
    )
    graph.output.append(helper.make_tensor_value_info(exit, TensorProto.FLOAT, [1, CLASSES]))


if __name__ == "__main__":
    sys.exit(main())
