"""Does an answer of real processes survive kills, and what does it send again? Counted, not timed.

`isthmus run --resume` behind a relay that stalls, cuts and resets, killed with SIGKILL and begun again, and a cloud
that is killed and begun again; each final answer against the same left in peace.

usage: nice python benchmarks/restarts.py [--processes 200] [--only 3,17]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import bundle
from record import Record
from scene import QUESTION, TOKENS, Cloud, finished, run, told_by

from isthmus.apps.bench.cloud_process import fresh_keys
from isthmus.edge import Device

LONG_QUESTION = " ".join([QUESTION] * 12)
MODES = ("stream", "verify", "auto", "split", "exit")
PROCESSES = 200
BLOWS = ("kills of the device", "kills of the cloud", "cuts", "stalls", "resets")
GAVE_UP, UNSURE = "devices that gave up, begun again", "answers that ended unconfirmed, gone on with"
AGAIN = 2  # times that a device which ended with an error, or with guesses that nobody confirmed, is begun again


def processes(record: Record, folder: Path, count: int, numbers: Sequence[int] = ()) -> None:
    """Blows to `count` answers, or to those of these numbers alone."""
    warmth = ("", "0.8")  # greedy, and sampled
    done: dict[str, int] = dict.fromkeys(BLOWS, 0)
    done[GAVE_UP] = done[UNSURE] = 0
    wrong = 0
    with fresh_keys() as key_folder:
        cloud = Cloud(folder, key_folder, 20)
        try:
            truth = _undisturbed(folder, key_folder, cloud.relay.address, warmth)
            for number in numbers or range(count):
                chance = random.Random(number)
                warm = number % 2
                talk = key_folder / f"{number}.talk"
                mode = chance.choice(MODES)
                said = _sequence(chance, cloud, folder, key_folder, talk, mode, warmth[warm], done)
                if said != truth[mode, warm]:
                    wrong += 1
                    print(f"process {number}, {mode}: {said} is not {truth[mode, warm]}", file=sys.stderr)
                talk.unlink(missing_ok=True)
                print(f"\r{number + 1} of {count} processes", end="", file=sys.stderr, flush=True)
        finally:
            cloud.close()
    print(file=sys.stderr)
    record.figure("run", count, "sequences", target=PROCESSES)
    record.figure("with a token lost, doubled or wrong", wrong, "sequences", target=0, at_most=True)
    record.figure("given up by the device, and begun again", done[GAVE_UP], "times")
    record.table("processes", ["what was done", "times"], sorted(done.items()))


def _undisturbed(
    folder: Path, key_folder: Path, address: str, warmth: Sequence[str]
) -> dict[tuple[str, int], list[int]]:
    """What is said in peace, by mode and temperature: by the model, but in exit mode also by its exit."""
    found: dict[tuple[str, int], list[int]] = {}
    for warm, temperature in enumerate(warmth):
        alone = finished(run(folder, key_folder, "", "local", temperature, None))["tokens"]
        talk = key_folder / f"undisturbed-{warm}.talk"
        by_exit = finished(run(folder, key_folder, address, "exit", temperature, talk))["tokens"]
        found |= {(mode, warm): by_exit if mode == "exit" else alone for mode in MODES}
    return found


def _sequence(
    chance: random.Random,
    cloud: Cloud,
    folder: Path,
    key_folder: Path,
    talk: Path,
    mode: str,
    temperature: str,
    done: dict[str, int],
) -> list[int]:
    """One answer through some blows; its tokens."""
    process = run(folder, key_folder, cloud.relay.address, mode, temperature, talk)
    early: dict[str, Any] | None = None
    for _ in range(chance.randint(1, 3)):
        time.sleep(chance.uniform(0.3, 1.6))
        blow = chance.choice(BLOWS)
        if process.poll() is not None or (talk.exists() and '["ended"' in talk.read_text()):
            break  # the answer is complete, or the device has given up
        done[blow] += 1
        if blow == "kills of the device":
            process.send_signal(signal.SIGKILL)
            out, err = process.communicate()
            if process.returncode != -signal.SIGKILL:
                early = told_by(out, err)  # it ended before it was hit
                done[blow] -= 1
                break
            process = run(folder, key_folder, cloud.relay.address, mode, temperature, talk)
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
    told = finished(process) if early is None else early
    for _ in range(AGAIN):
        if "error" in told:
            print(f"begun again after: {told['error'].strip()}", file=sys.stderr)
            done[GAVE_UP] += 1
        elif told["unverified"]:
            done[UNSURE] += 1  # the cloud stayed away: the same command goes on before what nobody has confirmed
        else:
            break
        told = finished(run(folder, key_folder, cloud.relay.address, mode, temperature, talk))
    tokens: list[int] = told["tokens"]
    return tokens


def sent_again(record: Record, folder: Path) -> None:
    """What a device sends for an answer, and what one sends that takes it up after the first was killed."""
    with fresh_keys() as key_folder:
        cloud = Cloud(folder, key_folder, 5)
        try:
            whole, again = _bytes_again(folder, key_folder, cloud.relay.address)
        finally:
            cloud.close()
    record.figure("bytes up for an answer", whole, "bytes")
    record.figure("bytes up to go on with it", again, "bytes")


def _bytes_again(folder: Path, key_folder: Path, address: str) -> tuple[int, int]:
    """What a device sends for an answer, and what one sends that takes it up after the first was killed."""
    with Device(folder, address, keys=key_folder, mode="stream", threads=1) as device:
        for _ in device.chat(LONG_QUESTION, max_tokens=TOKENS):
            pass
        whole = device.stats.bytes_up
    talk = key_folder / "again.talk"
    process = run(folder, key_folder, address, "stream", "", talk, LONG_QUESTION)
    while not talk.exists() or talk.read_text().count('"tokens"') < TOKENS // 2:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    with Device(folder, address, keys=key_folder, mode="stream", threads=1, resume=talk) as device:
        for _ in device.go_on():
            pass
        return whole, device.stats.bytes_up


def main() -> int:
    """Runs what was asked for and writes results/restarts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--only", default="", help="numbers of answers, to repeat them; writes nothing")
    options = parser.parse_args()
    record = Record("restarts", {"processes": options.processes, "tokens an answer": TOKENS})
    folder = bundle("keep").path
    processes(record, folder, options.processes, [int(number) for number in options.only.split(",") if number])
    if not options.only:
        sent_again(record, folder)
        record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
