"""A stub step in the engine's rhythm, and the processes around it: service, clients, a second engine."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import zmq

from isthmus.protocol import tensors
from isthmus.protocol.keys import AllowList, KeyPair
from isthmus.protocol.messages import Result, Rows, Sampler, decode, encode
from isthmus.protocol.transport import RouterTransport

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent / "engine" / "native"
STEP_MS, PHASES, D_MODEL, WARM_S = 2.6, 150, 576, 0.5


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    name: str
    openmp: bool
    threads: int
    passive: bool = False


def build(folder: Path) -> Path:
    """Compiles the stub step and the engine's pool into a library."""
    library = folder / "stub_step.so"
    flags = ["-O2", "-std=gnu11", "-fopenmp", "-pthread", "-shared", "-fPIC", f"-I{NATIVE}"]
    subprocess.run(["cc", *flags, str(HERE / "stub_step.c"), str(NATIVE / "pool.c"), "-o", str(library)], check=True)
    return library


def calibrate(library: Path) -> int:
    """Work in a phase, so that a step takes STEP_MS on idle cores."""
    work = ctypes.CDLL(str(library)).stub_work
    work.argtypes, work.restype = [ctypes.c_double], ctypes.c_long
    return int(work(STEP_MS * 1e-3 / PHASES))


def open_step(library: Path, work: int, variant: Variant) -> Callable[[], object]:
    """The step as a function; ctypes releases the interpreter lock while it runs."""
    native = ctypes.CDLL(str(library))
    phases, count = ctypes.c_int(PHASES), ctypes.c_long(work)
    if variant.openmp:
        threads = ctypes.c_int(variant.threads)
        return lambda: native.stub_step_openmp(threads, phases, count)
    native.im_pool_new.restype = ctypes.c_void_p
    pool = ctypes.c_void_p(native.im_pool_new(variant.threads))
    return lambda: native.stub_step_pool(pool, phases, count)


def serve(pipe: Connection, library: Path, work: int, variant: Variant, keys: KeyPair, allowed: Path, s: float) -> None:
    """The service: takes every request that waits, runs one step, answers all of them."""
    step = open_step(library, work, variant)
    router = RouterTransport("tcp://127.0.0.1:0", keys, AllowList(allowed))
    pipe.send(router.address)
    steps = requests = 0
    step_s = wait_s = begin = 0.0
    warm_until, until = float("inf"), float("inf")
    while (now := time.perf_counter()) < until:
        if now >= warm_until:
            steps, requests, step_s, wait_s, begin, warm_until = 0, 0, 0.0, 0.0, now, float("inf")
        router.poll(100)
        arrived = time.perf_counter()
        wait_s += arrived - now
        batch = []
        while (incoming := router.recv()) is not None:
            message = decode(incoming.frames)
            if isinstance(message, Rows) and message.hidden is not None:
                batch.append((incoming.route, message, tensors.decode(message.hidden, D_MODEL)))
        if not batch:
            continue
        if until == float("inf"):  # the first request
            warm_until, until = arrived + WARM_S, arrived + WARM_S + s
        start = time.perf_counter()
        step()
        spent = time.perf_counter() - start
        for route, rows, _ in batch:
            at = rows.position + 1
            router.send(route, encode(Result(rows.alias, rows.epoch, at - 1, [at], at, bytes(16), int(spent * 1e6), 0)))
        steps, requests, step_s = steps + 1, requests + len(batch), step_s + spent
    pipe.send((time.perf_counter() - begin, steps, requests, step_s, wait_s))
    pipe.recv()  # until the clients are gone
    router.close()


def ask(address: str, cloud: str, pairs: list[KeyPair]) -> None:
    """All clients in one loop: each sends its next request when its reply has come; the parent ends the process."""
    context, poller = zmq.Context(), zmq.Poller()
    hidden = tensors.encode(np.random.default_rng(0).standard_normal((1, D_MODEL), np.float32), "f16")
    sockets: dict[zmq.Socket[bytes], int] = {}
    for alias, pair in enumerate(pairs):
        socket = context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = pair.public.encode(), pair.secret.encode()
        socket.curve_serverkey = cloud.encode()
        socket.connect(address)
        poller.register(socket, zmq.POLLIN)
        sockets[socket] = alias
        socket.send_multipart(encode(Rows(alias, 1, 0, bytes(16), [1], hidden, sampler=Sampler(0.7))))
    while True:
        for socket, _ in poller.poll():
            reply = decode(socket.recv_multipart())
            if isinstance(reply, Result):
                at, token = reply.position + 1, reply.tokens[-1]
                rows = Rows(sockets[socket], 1, at, reply.prefix_hash, [token], hidden, sampler=Sampler(0.7))
                socket.send_multipart(encode(rows))


def neighbour(pipe: Connection, library: Path, work: int, variant: Variant) -> None:
    """A second engine that steps half of the time; told to stop, it gives its median step in ms."""
    step = open_step(library, work, variant)
    taken: list[float] = []
    while not pipe.poll():
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
        time.sleep(STEP_MS * 1e-3)
    pipe.send(statistics.median(taken) * 1e3)
