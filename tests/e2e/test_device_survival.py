"""Answers of real processes that are killed, and over links that are cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess
from isthmus.apps.bench.relay import Relay
from isthmus.apps.bench.shaping import LinkProfile
from isthmus.edge import Device
from isthmus.protocol.keys import AllowList, write_pair
from tests.edge_bundle import write_tiny

PROMPT = "tell me"
TOKENS = 120
SLOW = 40.0  # so that there is a middle to be killed in


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_pair(folder, "server")
    AllowList(folder / "allowed").allow(write_pair(folder, "device").public, "tester")
    return folder


@pytest.fixture(scope="module")
def cloud(bundle: Path, keys: Path) -> Iterator[CloudProcess]:
    with CloudProcess(bundle, keys, 1, SLOW) as running:
        yield running


@pytest.fixture(scope="module")
def text(bundle: Path) -> list[int]:
    with Device(bundle, mode="local", threads=1) as device:
        return [token.id for token in device.generate(PROMPT, max_tokens=TOKENS)]


def asked(bundle: Path, address: str, keys: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(bundle), "--cloud", address, "--keys", str(keys)]
    command += ["--prompt", PROMPT, "--raw", "--greedy", "--max-tokens", str(TOKENS), "--threads", "1", *options]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_device_goes_on_with_its_answer(
    bundle: Path, keys: Path, cloud: CloudProcess, text: list[int], tmp_path: Path
) -> None:
    talk = tmp_path / "talk"
    killed = asked(bundle, cloud.address, keys, "--mode", "stream", "--resume", str(talk))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not talk.exists() or talk.read_text().count('"cloud"') < 15):
        time.sleep(0.01)
    killed.kill()
    said = killed.communicate()[0]
    assert talk.read_text().count('"cloud"') < TOKENS
    out, err = asked(bundle, cloud.address, keys, "--mode", "stream", "--resume", str(talk), "--json").communicate()
    told = json.loads(out)
    assert told["tokens"] == text, err
    assert told["text"].startswith(said)
    assert told["reused_tokens"] >= told["prompt_tokens"] + 14  # the cloud has kept what it said before
    assert not told["unverified"] or told["note"]
    # Once more: nothing is left to go on with, and the question is asked anew.
    out, _ = asked(bundle, cloud.address, keys, "--mode", "stream", "--resume", str(talk)).communicate()
    assert out.rstrip("\n")


def test_a_pipe_gets_the_clouds_text_over_a_link_that_is_cut(
    bundle: Path, keys: Path, cloud: CloudProcess, tmp_path: Path
) -> None:
    whole = asked(bundle, cloud.address, keys, "--mode", "stream").communicate()[0]
    with Relay(cloud.address, LinkProfile.of_rtt(20)) as relay:
        process = asked(bundle, relay.address, keys, "--mode", "stream")
        assert process.stdout is not None
        first = process.stdout.read(1)  # the answer has begun
        relay.cut()
        mend = Timer(0.6, relay.mend)
        mend.start()
        out, _ = process.communicate(timeout=60)
        mend.join()
    assert first + out == whole


@pytest.mark.parametrize("mode", ["stream", "verify", "auto"])
@pytest.mark.parametrize("blow", ["cut", "stall", "reset"])
def test_a_device_goes_on_and_the_text_is_the_same(
    bundle: Path, keys: Path, cloud: CloudProcess, text: list[int], mode: str, blow: str
) -> None:
    with (
        Relay(cloud.address, LinkProfile.of_rtt(10)) as relay,
        Device(bundle, relay.address, keys=keys, mode=mode, threads=1, standby=True) as device,
    ):
        end = Timer(0.3, relay.mend if blow == "cut" else relay.resume)
        guesses = 0
        for number, token in enumerate(device.generate(PROMPT, max_tokens=TOKENS)):
            guesses += not token.verified or token.source == "device"
            if number == 20:
                getattr(relay, blow)()
                if blow != "reset":
                    end.start()
        if blow != "reset":
            end.join()
            assert guesses
        assert device.stats.tokens == text
        assert device.tokens[-len(text) :] == text


def test_what_cannot_be_taken_up_is_one_plain_error(bundle: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").write_text("hello\n")
    for file, problem in (("odd", "is no conversation of isthmus"), (".", "cannot be written")):
        command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(bundle), "--prompt", "a"]
        done = subprocess.run([*command, "--resume", str(tmp_path / file)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert problem in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*command, "--on-rollback", "keep"], capture_output=True, text=True, timeout=60)
    assert "--on-rollback has no effect without --cloud" in done.stderr
