"""`isthmus keys`: makes key pairs, and says which devices a cloud lets in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.protocol.keys import AllowList

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make keys and say which devices a cloud lets in.\n\n"
    "On one machine `isthmus keys new` is all it takes. Otherwise: `new` on the device, `allow` its key on the cloud, "
    "`trust` the cloud's key (which `isthmus serve` prints) on the device.",
)

DEVICE = "device"  # the pair that `isthmus run` reads
TAKES_KEYS = {"ignore_unknown_options": True}  # a key may begin with "-"

Folder = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FOLDER", help="Where keys are; by default $ISTHMUS_KEYS or ~/.config/isthmus/keys"),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What clouds call this device")] = DEVICE,
    keys: Folder = None,
) -> None:
    """Make this device's key pair, which `isthmus run` uses, and let it into a cloud on this machine.

    Where there is a pair already, it stays, and its public key is shown again.
    """
    from isthmus.protocol.errors import ProtocolError
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder, write_pair
    from isthmus.protocol.owners import check_owner

    if name == "server":
        raise ProtocolError("the name 'server' is the cloud's own", "choose another; `isthmus serve` makes its own key")
    check_owner(name)
    folder = keys or default_folder()
    secret = folder / f"{DEVICE}.key"
    allowed = AllowList(folder / ALLOWED)
    if secret.exists():
        _show_again(folder, name, allowed)
        return
    pair = write_pair(folder, DEVICE)
    allowed.allow(pair.public, name)
    print(f"{secret} is the secret, this the public key:\n{pair.public}")
    print(f"a cloud on this machine lets it in as {name}; elsewhere run:\nisthmus keys allow '{pair.public}' {name}")


def _show_again(folder: Path, name: str, allowed: AllowList) -> None:
    from isthmus.protocol.errors import ProtocolError
    from isthmus.protocol.keys import keys_option, read_pair

    key, secret = read_pair(folder, DEVICE).public, folder / f"{DEVICE}.key"
    known = allowed.principal(key)
    if known is not None and known != name:
        raise ProtocolError(
            f"{secret} exists already, with the public key '{key}', which this machine's list calls {known}",
            f"use it, or choose another folder with --keys for the key of {name}",
        )
    print(f"{secret} exists already, this is its public key:\n{key}")
    if known is None:
        line = f"isthmus keys allow '{key}' {name}"
        print(f"no cloud on this machine lets it in; here run:\n{line}{keys_option(folder)}\nelsewhere:\n{line}")
    else:
        print(f"a cloud on this machine lets it in as {known}; elsewhere run:\nisthmus keys allow '{key}' {known}")


@app.command("list")
def list_(keys: Folder = None) -> None:
    """Show the keys and the tokens' hashes that a cloud on this machine lets in, and whose they are."""
    import sys

    from isthmus.protocol.bearer import TOKENS, TokenList
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder

    path = (keys or default_folder()) / ALLOWED
    entries = AllowList(path).entries()
    for key, name in (*entries, *TokenList(path.with_name(TOKENS)).entries()):
        print(key, name)
    if not entries:
        print(f"no device is allowed in by {path}", file=sys.stderr)


@app.command(context_settings=TAKES_KEYS)
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
def token(
    name: Annotated[str, typer.Argument(help="Whose it is: one name may have several tokens, and keys")],
    keys: Folder = None,
) -> None:
    """Make a token for a program that speaks OpenAI's API to the cloud on this machine; it is shown once."""
    from isthmus.protocol.bearer import TOKENS, TokenList
    from isthmus.protocol.keys import default_folder

    print(TokenList((keys or default_folder()) / TOKENS).issue(name))


@app.command(context_settings=TAKES_KEYS)
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY|TOKEN|NAME", help="A public key, a .pub file, a token, or a name")],
    keys: Folder = None,
) -> None:
    """Take a key, a token, or all of a name, off the lists; a running cloud notices within a second."""
    from isthmus.protocol.bearer import TOKENS, TokenList
    from isthmus.protocol.errors import ProtocolError
    from isthmus.protocol.keys import ALLOWED, AllowList, default_folder, keys_option

    folder = keys or default_folder()
    count = AllowList(folder / ALLOWED).revoke(_key(key) if key.endswith(".pub") else key)
    tokens = TokenList(folder / TOKENS).withdraw(key)
    if not count and not tokens:
        raise ProtocolError(f"{key!r} is not on the lists in {folder}", f"see: isthmus keys list{keys_option(folder)}")
    for many, what in ((count, "key"), (tokens, "token")):
        if many:
            print(f"{many} {what}{'' if many == 1 else 's'} taken off the list")


@app.command(context_settings=TAKES_KEYS)
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
