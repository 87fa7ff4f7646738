"""Does an answer survive its device, its link and its cloud? Counted, not timed; only the last part takes a clock.

1. Sequences: random ones of drop, repeat, reorder, cut, kill and restart against the device's and the cloud's own code
   over a simulated link (the state machine of tests/edge_survival.py), with tokens lost, doubled or wrong counted.
2. Processes: `isthmus run --resume` behind a relay that stalls, cuts and resets, killed with SIGKILL and begun again,
   and a cloud that is killed and begun again; each final answer against that of the model left in peace.
3. Silence: how long after a link has gone dark the device says its next token by itself, and how much a device that was
   killed sends again.

usage: nice python benchmarks/survival.py [--sequences 5000] [--processes 200] [--cuts 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models import bundle
from record import ROOT, Record

from isthmus.apps.bench.relay import Relay
from isthmus.apps.bench.shaping import LinkProfile
from isthmus.apps.cli.cloud_process import CloudProcess
from isthmus.edge import Device, Timeouts
from isthmus.protocol.keys import AllowList, write_pair

QUESTION = "Tell me a story about a fox and the sea."
LONG_QUESTION = " ".join([QUESTION] * 12)
MODES = ("stream", "verify", "auto", "split")
TOKENS = 64
SEQUENCES, PROCESSES = 5000, 200
BLOWS = ("kills of the device", "kills of the cloud", "cuts", "stalls", "resets")
AGAIN = 2  # times that a device which ended with an error is begun again
ROUND_TRIPS_MS = (5, 50, 200)
LEAST_MS = 50.0


def sequences(record: Record, count: int) -> None:
    """Part 1."""
    sys.path.insert(0, str(ROOT))
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    import isthmus.engine
    from tests.edge_survival import Survival
    from tests.edge_world import toy_open_part

    opened = isthmus.engine.open_part
    isthmus.engine.open_part = toy_open_part
    failed = 0
    try:
        run_state_machine_as_test(
            Survival,
            settings=settings(
                max_examples=count,
                stateful_step_count=20,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except AssertionError as error:
        failed = 1
        print(error, file=sys.stderr)
    finally:
        isthmus.engine.open_part = opened
    record.figure("sequences/run", Survival.done["sequences"], "sequences", target=SEQUENCES)
    record.figure("sequences/with a token lost, doubled or wrong", failed, "sequences", target=0, at_most=True)
    record.table("sequences", ["what was done", "times"], sorted(Survival.done.items()))


class Cloud:
    """A cloud process that is killed and begun again on its port, and the relay before it."""

    def __init__(self, folder: Path, keys: Path, rtt_ms: float) -> None:
        self._folder, self._keys = folder, keys
        self._process = CloudProcess(folder, keys, 1)
        self._process.__enter__()
        self.relay = Relay(self._process.address, LinkProfile.of_rtt(rtt_ms))
        self.relay.__enter__()

    def restart(self) -> None:
        """SIGKILL, and another one."""
        self._process.kill()
        self._process = CloudProcess(self._folder, self._keys, 1, port=int(self._process.address.rpartition(":")[2]))
        self._process.__enter__()

    def close(self) -> None:
        """Ends both."""
        self.relay.close()
        self._process.__exit__(None, None, None)


@contextlib.contextmanager
def keys() -> Iterator[Path]:
    """A folder with a cloud's and a device's keys."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as temporary:
        folder = Path(temporary)
        write_pair(folder, "server")
        AllowList(folder / "allowed").allow(write_pair(folder, "device").public, "bench")
        yield folder


def processes(record: Record, folder: Path, count: int, numbers: Sequence[int] = ()) -> None:
    """Part 2; `numbers` repeats some of the sequences."""
    warmth = ("", "0.8")  # greedy, and sampled
    done: dict[str, int] = dict.fromkeys(BLOWS, 0)
    done["devices that gave up, begun again"] = 0
    wrong = 0
    with keys() as key_folder:
        cloud = Cloud(folder, key_folder, 20)
        try:
            truth = {
                warm: _finished(_run(folder, key_folder, "", "local", temperature, None))["tokens"]
                for warm, temperature in enumerate(warmth)
            }
            for number in numbers if numbers else range(count):
                chance = random.Random(number)
                warm = number % 2
                talk = key_folder / f"{number}.talk"
                said = _sequence(chance, cloud, folder, key_folder, talk, warmth[warm], done)
                if said != truth[warm]:
                    wrong += 1
                    print(f"process {number}: {said} is not {truth[warm]}", file=sys.stderr)
                talk.unlink(missing_ok=True)
                print(f"\r{number + 1} of {count} processes", end="", file=sys.stderr, flush=True)
        finally:
            cloud.close()
    print(file=sys.stderr)
    record.figure("processes/run", count, "sequences", target=PROCESSES)
    record.figure("processes/with a token lost, doubled or wrong", wrong, "sequences", target=0, at_most=True)
    record.table("processes", ["what was done", "times"], sorted(done.items()))


def _sequence(
    chance: random.Random,
    cloud: Cloud,
    folder: Path,
    key_folder: Path,
    talk: Path,
    temperature: str,
    done: dict[str, int],
) -> list[int]:
    """One answer through some blows; its tokens."""
    mode = chance.choice(MODES)
    process = _run(folder, key_folder, cloud.relay.address, mode, temperature, talk)
    for _ in range(chance.randint(1, 3)):
        time.sleep(chance.uniform(0.3, 1.6))
        blow = chance.choice(BLOWS)
        if process.poll() is not None or (talk.exists() and '["ended"' in talk.read_text()):
            break  # the answer is complete (the same command would ask once more), or the device has given up
        done[blow] += 1
        if blow == "kills of the device":
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = _run(folder, key_folder, cloud.relay.address, mode, temperature, talk)
        elif blow == "kills of the cloud":
            cloud.restart()
        elif blow == "cuts":
            cloud.relay.cut()
            time.sleep(chance.uniform(0.1, 1.0))
            cloud.relay.mend()
        elif blow == "stalls":
            cloud.relay.stall()
            time.sleep(chance.uniform(0.1, 1.0))
            cloud.relay.resume()
        else:
            cloud.relay.reset()
    told = _finished(process)
    for _ in range(AGAIN):
        if "error" not in told:
            break
        print(f"begun again after: {told['error'].strip()}", file=sys.stderr)
        done["devices that gave up, begun again"] += 1
        told = _finished(_run(folder, key_folder, cloud.relay.address, mode, temperature, talk))
    tokens: list[int] = told["tokens"]
    return tokens


def _run(
    folder: Path,
    key_folder: Path,
    address: str,
    mode: str,
    temperature: str,
    talk: Path | None,
    question: str = QUESTION,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(folder), "--prompt", question, "--json"]
    command += ["--mode", mode, "--threads", "1", "--max-tokens", str(TOKENS)]
    command += ["--temperature", temperature, "--seed", "5"] if temperature else ["--greedy"]
    if mode != "local":
        command += ["--cloud", address, "--keys", str(key_folder), "--resume", str(talk)]
    command += ["--codec", "f32"] if mode == "split" else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    try:
        told: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError:
        return {"tokens": [], "error": err}
    return told


def silence(record: Record, folder: Path, cuts: int) -> None:
    """Part 3."""
    rows: list[list[str | int | float | None]] = []
    for rtt_ms in ROUND_TRIPS_MS:
        with keys() as key_folder:
            cloud = Cloud(folder, key_folder, rtt_ms)
            try:
                for mode in ("stream", "verify", "exit"):
                    gaps = [_gap_ms(folder, key_folder, cloud.relay, mode) for _ in range(cuts)]
                    bound = max(LEAST_MS, 2.0 * rtt_ms)
                    gap = statistics.median(gaps)
                    record.figure(f"silence/{mode} at {rtt_ms} ms", gap, "ms", target=bound, at_most=True)
                    rows.append([mode, rtt_ms, round(gap, 1), round(max(gaps), 1), bound])
            finally:
                cloud.close()
    record.table(
        "silence",
        ["mode", "round trip, ms", "median, ms", "longest, ms", "two round trips, 50 ms at least"],
        rows,
        note="From the last token that the cloud gave to the first that the device says by itself.",
    )
    with keys() as key_folder:
        cloud = Cloud(folder, key_folder, 5)
        try:
            whole, again = _bytes_again(folder, key_folder, cloud.relay.address)
        finally:
            cloud.close()
    record.figure("restart/bytes up for an answer", whole, "bytes")
    record.figure("restart/bytes up to go on with it", again, "bytes")


def _gap_ms(folder: Path, key_folder: Path, relay: Relay, mode: str) -> float:
    with Device(folder, relay.address, keys=key_folder, mode=mode, threads=1, timeouts=Timeouts(20_000)) as device:
        last = cut = 0.0
        for number, token in enumerate(device.chat(QUESTION, max_tokens=120)):
            now = time.perf_counter()
            if cut and not token.verified:
                relay.mend()
                return (now - max(last, cut)) * 1e3
            last = now
            if number == 24:
                relay.cut()
                cut = time.perf_counter()
    raise RuntimeError("the device did not go on by itself")


def _bytes_again(folder: Path, key_folder: Path, address: str) -> tuple[int, int]:
    """What a device sends for an answer, and what one sends that takes it up after the first was killed."""
    with Device(folder, address, keys=key_folder, mode="stream", threads=1) as device:
        for _ in device.chat(LONG_QUESTION, max_tokens=TOKENS):
            pass
        whole = device.stats.bytes_up
    talk = key_folder / "again.talk"
    process = _run(folder, key_folder, address, "stream", "", talk, LONG_QUESTION)
    while not talk.exists() or talk.read_text().count('"tokens"') < TOKENS // 2:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    with Device(folder, address, keys=key_folder, mode="stream", threads=1, resume=talk) as device:
        for _ in device.go_on():
            pass
        return whole, device.stats.bytes_up


def main() -> int:
    """Runs what was asked for and writes results/survival.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--cuts", type=int, default=10, help="for each mode and round trip")
    options = parser.parse_args()
    record = Record("survival", vars(options) | {"tokens an answer": TOKENS})
    folder = bundle("keep").path
    if options.sequences:
        sequences(record, options.sequences)
    if options.processes:
        processes(record, folder, options.processes)
    if options.cuts:
        silence(record, folder, options.cuts)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
