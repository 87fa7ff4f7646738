"""Work on files of strangers, in a child process that may take so much memory and time and no more."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from importlib import import_module
from typing import Any

from isthmus.protocol.errors import IsthmusError, PlanError

MEMORY_BYTES = 24 << 30  # of addresses, not of memory in use: runtimes reserve more than they take
SECONDS = 600  # of the processor
PATIENCE = 3  # times the processor's seconds that it may take by the clock
FILE_BYTES = 64 << 30  # of a file that it writes


def confined(call: str, *arguments: Any, what: str, memory_bytes: int = MEMORY_BYTES, seconds: int = SECONDS) -> Any:
    """What a function gives that is called in a child process.

    Args:
        call: "module:function"; the function raises `IsthmusError` for what a person can mend.
        arguments: plain data, as JSON has it; so is the result.
        what: is done, for error messages.
        memory_bytes: of addresses.
        seconds: of the processor.

    Raises:
        PlanError: as the function did; or the child was ended by a limit, or crashed.
    """
    limits = {"memory_bytes": memory_bytes, "seconds": seconds}
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", __name__],  # nothing is imported from the folder where the model lies
            input=json.dumps({"call": call, "arguments": arguments, "limits": limits}),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE * seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise PlanError(f"{what} took more than {PATIENCE * seconds} s", "simplify the model") from error
    if child.returncode == 0:
        told = json.loads(child.stdout.rpartition("\n")[2])
        if "problem" in told:
            raise PlanError(told["problem"], told["remedy"])
        return told["result"]
    if child.returncode == -signal.SIGXCPU:
        raise PlanError(f"{what} took more than {seconds} s of the processor", "simplify the model")
    if child.returncode == -signal.SIGKILL:
        raise PlanError(f"{what} was killed, most likely because memory ran out", "take a smaller model or input")
    if "MemoryError" in child.stderr or "bad_alloc" in child.stderr:
        raise PlanError(f"{what} takes more than {memory_bytes >> 30} GiB of memory", "take a smaller model or input")
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
    ended = f"signal {-child.returncode}" if child.returncode < 0 else f"code {child.returncode}"
    raise PlanError(f"{what} ended with {ended}: {last}", "the model is damaged, or not what it seems")


def main() -> int:
    """The child: reads a call, and prints what came of it."""
    asked = json.load(sys.stdin)
    limits = asked["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"])
    _limit(resource.RLIMIT_CPU, limits["seconds"], limits["seconds"] + 5)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES)
    module, _, name = asked["call"].partition(":")
    try:
        told = {"result": getattr(import_module(module), name)(*asked["arguments"])}
    except ModuleNotFoundError as error:
        extra = "litert" if (error.name or "").startswith(("ai_edge_litert", "tflite")) else "plan"
        told = {"problem": f"{error.name} is not installed", "remedy": f"pip install 'isthmus[{extra}]'"}
    except IsthmusError as error:
        told = {"problem": error.problem, "remedy": error.remedy}
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        told = {"problem": f"{error.strerror}{where}", "remedy": "the system refused it"}
    print("\n" + json.dumps(told), end="")
    return 0


def _limit(what: int, soft: int, hard: int) -> None:
    """Sets a limit, or leaves the one that this process has if that is lower."""
    _, most = resource.getrlimit(what)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(what, (soft, hard))


if __name__ == "__main__":
    sys.exit(main())
