"""CURVE keys in files, and the list of device keys that a service lets in.

A key pair is two files: NAME.key holds the secret (mode 0600), NAME.pub the public key, each as 40 characters of Z85
(ZeroMQ RFC 32). The list holds one `KEY PRINCIPAL` a line. Sessions belong to the principal, not to the key, so a
device can change its key, or a person own several devices.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.owners import OwnerList, check_owner, write_private

ALLOWED = "allowed"  # file name of the list inside a keys folder
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


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
        write_private(secret, pair.secret + "\n", 0o600)
        write_private(public, pair.public + "\n", 0o644)
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
        write_private(folder / f"{cloud}.pub", key + "\n", 0o644)
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


class AllowList(OwnerList):
    """The keys that a service lets in, and whose they are. Edits of the file count from the next `refresh`."""

    def __init__(self, path: Path) -> None:
        self._lent: dict[str, str] = {}
        self._lent_anew = False
        super().__init__(path, _Z85, "key")

    def principal(self, entry: str) -> str | None:
        """Whose key it is, or None when it is not on the list."""
        return super().principal(entry) or self._lent.get(entry)

    def principals(self) -> set[str]:
        """Everybody who is let in."""
        return {name for _, name in self.entries()} | set(self._lent.values())

    def lend(self, key: str, name: str) -> None:
        """Lets a key of this very service's own in for somebody, until `give_back`; the file knows nothing of it.

        Raises:
            ProtocolError: no key, or no name.
        """
        self._lent[check_key(key)] = check_owner(name)
        self._lent_anew = True

    def give_back(self, name: str) -> None:
        """Ends what was lent in somebody's name."""
        self._lent = {key: owner for key, owner in self._lent.items() if owner != name}
        self._lent_anew = True

    def refresh(self) -> bool:
        """Reads the file again if it changed; whether it did, or keys were lent.

        Raises:
            ProtocolError: a line that is no entry; the list before stays in force.
        """
        changed = super().refresh() or self._lent_anew
        self._lent_anew = False
        return changed

    def allow(self, key: str, name: str) -> None:
        """Puts a key on the list and writes the file.

        Raises:
            ProtocolError: no key, or no name; or the file cannot be written.
        """
        self.put(check_key(key), name)


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
