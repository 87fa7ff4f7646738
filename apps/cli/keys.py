"""`isthmus keys`: makes key pairs, and says which devices a cloud lets in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make keys and say which devices a cloud lets in.\n\n"
    "On one machine `isthmus keys new` is all it takes. Otherwise: `new` on the device, `allow` its key on the cloud, "
    "`trust` the cloud's key (which `isthmus serve` prints) on the device.",
)

Folder = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FOLDER", help="Where keys are; by default $ISTHMUS_KEYS or ~/.config/isthmus/keys"),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the device")] = "device",
    keys: Folder = None,
    owner: Annotated[str | None, typer.Option(help="Whose sessions its are; by default the device's name")] = None,
) -> None:
    """Make a key pair for a device, and let it into a cloud on this machine."""
    from isthmus.protocol.errors import ProtocolError
    from isthmus.protocol.keys import ALLOWED, AllowList, check_owner, default_folder, write_pair

    if name == "server":
        raise ProtocolError("the name 'server' is the cloud's own", "choose another; `isthmus serve` makes its own key")
    owner = check_owner(name if owner is None else owner)
    folder = keys or default_folder()
    pair = write_pair(folder, name)
    AllowList(folder / ALLOWED).allow(pair.public, owner)
    print(f"{folder / name}.key is the secret, this the public key:\n{pair.public}")
    print(f"A cloud on this machine lets it in. Elsewhere run: isthmus keys allow '{pair.public}' {owner}")


@app.command("list")
def list_(keys: Folder = None) -> None:
    """Show the keys that a cloud on this machine lets in, and whose they are."""
    import sys

    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder

    path = (keys or default_folder()) / ALLOWED
    entries = AllowList(path).entries()
    for key, name in entries:
        print(key, name)
    if not entries:
        print(f"no device is allowed in by {path}", file=sys.stderr)


@app.command()
def allow(
    key: Annotated[str, typer.Argument(help="A public key, or a .pub file")],
    name: Annotated[str, typer.Argument(help="Whose it is: one name may have several keys")],
    keys: Folder = None,
) -> None:
    """Let a key into the cloud; a running one notices within a second."""
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder

    folder = keys or default_folder()
    AllowList(folder / ALLOWED).allow(_key(key), name)
    print(f"{name} may connect")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY|NAME", help="A public key, a .pub file, or a name")],
    keys: Folder = None,
) -> None:
    """Take a key, or all keys of a name, off the list; a running cloud notices within a second."""
    from isthmus.protocol.errors import ProtocolError
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder

    folder = keys or default_folder()
    count = AllowList(folder / ALLOWED).revoke(_key(key) if key.endswith(".pub") else key)
    if not count:
        raise ProtocolError(f"{key!r} is not on the list in {folder}", "see: isthmus keys list")
    print(f"{count} {'key' if count == 1 else 'keys'} taken off the list")


@app.command()
def trust(
    key: Annotated[str, typer.Argument(help="The cloud's public key, as `isthmus serve` prints it, or a .pub file")],
    keys: Folder = None,
) -> None:
    """Remember the key of the cloud that devices on this machine talk to."""
    from isthmus.protocol.keys import default_folder, write_trusted

    folder = keys or default_folder()
    write_trusted(folder, _key(key))
    print(f"devices with keys in {folder} trust this cloud")


def _key(text: str) -> str:
    from isthmus.protocol.keys import check_key, read_public

    return read_public(Path(text)) if text.endswith(".pub") else check_key(text)
