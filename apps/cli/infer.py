"""`isthmus run` with a network that was cut: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import typer

    from isthmus.protocol.arrays import Array
    from isthmus.split.pictures import Preprocess

TAKEN = {
    "bundle",
    "input_",
    "output",
    "times",
    "depth",
    "no_exits",
    "mode",
    "cloud",
    "keys",
    "no_keys",
    "threads",
    "json",
    "codec",
}
SHOWN = 6  # values of an output


def infer(ctx: typer.Context) -> None:
    """Runs the network that `isthmus run` was given, and prints what came of it.

    Raises:
        DeviceError: an option of language models, no input, or one that the network does not take.
    """
    import statistics
    import time
    from itertools import repeat
    from json import dumps

    from isthmus.apps.cli.given import given_options
    from isthmus.edge.graph import GraphDevice
    from isthmus.edge.graph_stats import GraphStats
    from isthmus.protocol.arrays import Array
    from isthmus.protocol.errors import DeviceError
    from isthmus.split.graph_bundle import GraphBundle

    options = ctx.params
    for name in (name for name in options if name in given_options(ctx) - TAKEN):
        option = "--" + name.strip("_").replace("_", "-")
        raise DeviceError(f"{option} is for language models", "this bundle is a network: leave it out")
    if options["input_"] is None:
        raise DeviceError(
            f"{options['bundle']} is a network", "give it arrays: --input FILE.npz (or .npy, or a picture)"
        )
    _check_writable(options["output"])
    bundle = GraphBundle.open(options["bundle"])
    given = read_given(options["input_"], bundle.manifest.preprocess)
    with GraphDevice(
        bundle,
        options["cloud"],
        mode=options["mode"],
        keys=options["keys"],
        encrypted=not options["no_keys"],
        threads=options["threads"],
        codec=_codec(ctx),
        exits=not options["no_exits"],
    ) as device:
        runs, times, depth = list[GraphStats](), options["times"], options["depth"]
        done_s = [time.perf_counter()]
        inputs, found = repeat(given, times), dict[str, Array]()
        for outputs in device.stream(inputs, depth) if depth else map(device.infer, inputs):
            found = outputs
            done_s.append(time.perf_counter())
            runs.append(device.stats)
    if options["output"] is not None:
        _write(options["output"], found)
    last = runs[-1]
    told: dict[str, Any] = last.to_dict()
    for name in ("device_ms", "rest_ms", "cloud_ms"):
        same = [getattr(run, name) for run in runs if run.where == last.where]
        told[name] = round(statistics.median(same), 3)
    told |= {"ms": round(statistics.median(run.device_ms + run.rest_ms for run in runs), 3)}
    told |= {"times": len(runs), "in_the_cloud": sum(run.where == "cloud" for run in runs)}
    told |= {"left_early": sum(bool(run.exit) for run in runs)}
    told |= {"codec": device.codec or "raw", "inputs_s": round(_rate(done_s, depth), 3)}
    if options["json"]:
        shapes = {name: {"dtype": one.dtype.name, "shape": list(one.shape)} for name, one in found.items()}
        print(dumps(told | {"outputs": shapes}))
        return
    for name, one in found.items():
        print(f"{name}  {one.dtype.name} {list(one.shape)}  {_values(one)}")
    _print(told)


def _rate(done_s: Sequence[float], depth: int) -> float:
    """Inputs a second, once it runs: the first one also warms up, and the first `depth` fill a pipeline.

    Args:
        done_s: when it began, and when each was done; of too few of them all count.
    """
    first = max(1, depth) if len(done_s) - 1 > max(1, depth) else 0
    return (len(done_s) - 1 - first) / max(done_s[-1] - done_s[first], 1e-9)


def _codec(ctx: typer.Context) -> str | None:
    """What was asked for on the command line; None for the bundle's own."""
    from isthmus.apps.cli.given import given_options

    return str(ctx.params["codec"]) if "codec" in given_options(ctx) else None


def read_given(path: Path, how: Preprocess | None) -> Any:
    """A file's arrays, or what is made of its picture.

    Raises:
        DeviceError: it is neither, or nothing is known of pictures.
    """
    from isthmus.protocol.errors import DeviceError, PlanError
    from isthmus.protocol.pictures import pillow
    from isthmus.split.pictures import SUFFIXES

    if path.suffix.lower() not in SUFFIXES:
        return read_arrays(path)
    if how is None:
        problem = f"{path} is a picture, and this bundle does not say what is done with pictures"
        raise DeviceError(problem, "plan with --preprocess, or give arrays: --input FILE.npz")
    pillow()
    try:
        return {how.input: how.array(how.shown(path))}
    except PlanError as error:
        raise DeviceError(error.problem, "name a picture that can be read") from error


def read_arrays(path: Path) -> Any:
    """Inputs: of a .npz file by their names, of a .npy file one.

    Raises:
        DeviceError: it is neither.
    """
    import zlib
    from zipfile import BadZipFile

    import numpy as np

    from isthmus.protocol.errors import DeviceError
    from isthmus.split.files import open_regular

    try:
        with open_regular(path) as file:
            opened = np.load(file, allow_pickle=False)
            return {name: opened[name] for name in opened.files} if hasattr(opened, "files") else opened
    except OSError as error:
        raise DeviceError(f"{path} cannot be read ({error.strerror})", "name a .npz or .npy file") from error
    except (ValueError, EOFError, BadZipFile, zlib.error, RuntimeError) as error:  # of encrypted archives, the last
        raise DeviceError(f"{path} is no .npz or .npy file of plain arrays", "write it with numpy.savez") from error


def _check_writable(path: Path | None) -> None:
    """Refuses a place for outputs before anything is computed."""
    from isthmus.protocol.errors import DeviceError

    if path is not None and (path.suffix != ".npz" or not path.parent.is_dir()):
        raise DeviceError(f"--output is {path}", "name a .npz file in a folder that is there")


def _write(path: Path, found: Mapping[str, Array]) -> None:
    """Writes the outputs; an array may have any name, even one that `numpy.savez` takes for an argument."""
    import io
    from zipfile import ZipFile

    import numpy as np

    from isthmus.split.files import write_whole

    data = io.BytesIO()
    with ZipFile(data, "w") as archive:
        for name, one in found.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(one) if one.ndim else one, allow_pickle=False)
    write_whole(path, data.getvalue())


def _values(one: Array) -> str:
    shown = ", ".join(f"{value:.4g}" for value in one.ravel()[:SHOWN].tolist())
    return f"[{shown}{', ...' if one.size > SHOWN else ''}]"


def _print(told: Mapping[str, Any]) -> None:
    import sys

    if told["where"] == "cloud":
        there = f"{told['rest_ms']:.1f} ms for the rest in the cloud ({told['cloud_ms']:.1f} ms of them computing)"
        bytes_ = f", {told['bytes_up']:,} bytes up ({told['codec']}) and {told['bytes_down']:,} down"
    elif told["exit"]:
        there, bytes_ = f"and no more: {told['exit']} is sure", ""
    else:
        there, bytes_ = f"{told['rest_ms']:.1f} ms for the rest, here, too", ""
    times = f" (medians of {told['times']} runs, {told['inputs_s']:.4g} a second)" if told["times"] > 1 else ""
    print(f"{told['ms']:.1f} ms: {told['device_ms']:.1f} ms here, {there}{bytes_}{times}", file=sys.stderr)
    if told["note"]:
        print(f"note: {told['note']}", file=sys.stderr)
