"""CURVE keys in files, and the list of device keys that a service lets in.

A key pair is two files: NAME.key holds the secret (mode 0600), NAME.pub the public key, each as 40 characters of Z85
(ZeroMQ RFC 32). The list holds one `KEY PRINCIPAL` a line. Sessions belong to the principal, not to the key, so a
device can change its key, or a person own several devices.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.protocol.errors import ProtocolError

ALLOWED = "allowed"  # file name of the list inside a keys folder
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair in Z85, 40 characters each."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """What a device needs to connect: its own pair and the cloud's public key."""

    pair: KeyPair
    cloud: str


def default_folder() -> Path:
    """Where keys live unless told otherwise: $ISTHMUS_KEYS, else isthmus/keys in the user's configuration.

    Raises:
        ProtocolError: the user has no home.
    """
    if told := os.environ.get("ISTHMUS_KEYS"):
        return Path(told)
    config = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(config) if config else Path.home() / ".config") / "isthmus" / "keys"
    except RuntimeError as error:
        raise ProtocolError("there is no home folder to keep keys in", "set ISTHMUS_KEYS to a folder") from error


def new_pair() -> KeyPair:
    """A fresh random key pair whose public key can be given on a command line.

    It does not begin as an option does, and has no `!`, which csh replaces even between single quotes.
    """
    import zmq

    public, secret = zmq.curve_keypair()
    while public.startswith(b"-") or b"!" in public:
        public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def keys_option(folder: Path) -> str:
    """What a command needs beside its name to use this folder: ` --keys FOLDER`, or nothing for the default one."""
    try:
        usual = folder == default_folder()
    except ProtocolError:
        usual = False
    return "" if usual else f" --keys {shlex.quote(str(folder))}"


def write_pair(folder: Path, name: str, *, replace: bool = False) -> KeyPair:
    """Makes a pair and writes NAME.key and NAME.pub into `folder`, which is made (mode 0700) when missing.

    Raises:
        ProtocolError: the name is unfit, or the files exist and `replace` is off.
    """
    check_owner(name)
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    pair = new_pair()
    try:
        if not replace and (there := [str(path) for path in (secret, public) if path.exists()]):
            raise ProtocolError(f"{' and '.join(there)} exist already", "keep using them, or remove them first")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(secret, pair.secret + "\n", 0o600)
        _write(public, pair.public + "\n", 0o644)
    except OSError as error:
        raise ProtocolError(f"cannot write keys to {folder}: {error.strerror}", "choose a folder of yours") from error
    return pair


def read_pair(folder: Path, name: str) -> KeyPair:
    """The pair NAME from a folder.

    Raises:
        ProtocolError: a file is missing, unreadable by its mode, or no key; or the two do not belong together.
    """
    secret = folder / f"{name}.key"
    if secret.exists() and secret.stat().st_mode & 0o077:
        raise ProtocolError(f"others may read the secret key {secret}", f"run: chmod 600 {secret}")
    remedy = f"run: isthmus keys new{keys_option(folder)}"
    if name == "server":
        remedy = f"put it back, or remove {name}.* for `isthmus serve` to make new ones"
    elif not secret.exists() and (others := _other_pairs(folder, name)):
        remedy = f"{folder} has {', '.join(others)}: rename those files to {name}.key and {name}.pub, or {remedy}"
    pair = KeyPair(_read_key(folder / f"{name}.pub", remedy), _read_key(secret, remedy))
    import zmq

    if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
        raise ProtocolError(f"{name}.key and {name}.pub in {folder} do not belong together", "make a new pair")
    return pair


def read_public(path: Path) -> str:
    """A public key from its file.

    Raises:
        ProtocolError: missing, or no key.
    """
    return _read_key(path)


def read_device(folder: Path, name: str = "device", cloud: str = "server") -> DeviceKeys:
    """A device's keys: its pair NAME and the public key of its cloud, both from `folder`.

    Raises:
        ProtocolError: as `read_pair` and `read_public`.
    """
    pair = read_pair(folder, name)
    if not (folder / f"{cloud}.pub").exists():
        raise ProtocolError(
            f"there is no key of the cloud in {folder}",
            "start `isthmus serve` first, if it is to run on this machine; else it prints its key there: "
            f"isthmus keys trust 'KEY'{keys_option(folder)}",
        )
    return DeviceKeys(pair, read_public(folder / f"{cloud}.pub"))


def write_trusted(folder: Path, key: str, cloud: str = "server") -> None:
    """Remembers a cloud's public key for the devices whose keys are in `folder`.

    Raises:
        ProtocolError: no key, or the folder holds the cloud's own pair.
    """
    check_key(key)
    if (folder / f"{cloud}.key").exists():
        raise ProtocolError(f"{folder} holds a cloud's own keys", "choose another folder with --keys")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(folder / f"{cloud}.pub", key + "\n", 0o644)
    except OSError as error:
        raise ProtocolError(f"cannot write keys to {folder}: {error.strerror}", "choose a folder of yours") from error


def check_key(key: str) -> str:
    """The key itself when it is one.

    Raises:
        ProtocolError: not 40 characters of Z85.
    """
    if not _Z85.fullmatch(key):
        raise ProtocolError(f"{key[:60]!r} is no CURVE key", "a key is 40 characters of Z85, as in a .pub file")
    return key


def check_owner(name: str) -> str:
    """The name itself when it is fit for a key file or a principal.

    Raises:
        ProtocolError: other than letters, digits and . _ @ -, or too long.
    """
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"{name[:80]!r} is no name", "use up to 64 letters, digits, and . _ @ -")
    return name


class AllowList:
    """The keys that a service lets in, and whose they are. Edits of the file count from the next `refresh`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, str] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.refresh()

    def principal(self, key: str) -> str | None:
        """Whose key it is, or None when it is not on the list."""
        return self._names.get(key)

    def entries(self) -> list[tuple[str, str]]:
        """(key, principal) in the file's order."""
        return list(self._names.items())

    def refresh(self) -> bool:
        """Reads the file again if it changed; whether it did. A missing file is an empty list.

        Raises:
            ProtocolError: a line that is no `KEY PRINCIPAL`; the list before stays in force.
        """
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return False
            text = self.path.read_text()
        except FileNotFoundError:
            changed, self._names, self._stamp = bool(self._names), {}, None
            return changed
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ProtocolError(f"cannot read the list of keys {self.path}: {why}", "mend or remove it") from error
        names: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            # A key may itself begin with '#', so a comment needs the space.
            if not line.strip() or line.startswith("# "):
                continue
            key, _, name = line.strip().partition(" ")
            if not _Z85.fullmatch(key) or not _NAME.fullmatch(name.strip()):
                raise ProtocolError(f"line {number} of {self.path} is no entry", "write: KEY PRINCIPAL")
            names[key] = name.strip()
        self._names, self._stamp = names, stamp
        return True

    def allow(self, key: str, name: str) -> None:
        """Puts a key on the list and writes the file.

        Raises:
            ProtocolError: no key, or no name.
        """
        self._names[check_key(key)] = check_owner(name)
        self._save()

    def revoke(self, key_or_name: str) -> int:
        """Takes a key, or all keys of a principal, off the list and writes the file; how many."""
        gone = [key for key, name in self._names.items() if key_or_name in (key, name)]
        for key in gone:
            del self._names[key]
        if gone:
            self._save()
        return len(gone)

    def _save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self.path, "".join(f"{key} {name}\n" for key, name in self._names.items()), 0o600)
        except OSError as error:
            raise ProtocolError(f"cannot write {self.path}: {error.strerror}", "choose a folder of yours") from error


def _other_pairs(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.glob("*.key") if path.stem not in (name, "server"))


def _read_key(path: Path, remedy: str = "check the name of the file") -> str:
    try:
        key = path.read_text().strip()
    except FileNotFoundError as error:
        raise ProtocolError(f"there is no key file {path}", remedy) from error
    except OSError as error:
        remedy = "name the folder that holds it with --keys, and make sure that you may read it"
        raise ProtocolError(f"cannot read the key file {path}: {error.strerror}", remedy) from error
    except UnicodeDecodeError:
        key = ""
    try:
        return check_key(key)
    except ProtocolError as error:
        raise ProtocolError(f"{path} holds no CURVE key", error.remedy) from None


def _write(path: Path, text: str, mode: int) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(handle, mode)
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
