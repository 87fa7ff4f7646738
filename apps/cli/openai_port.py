"""`isthmus serve --openai`: where OpenAI's API is answered, for whom, and with which certificate."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cloud.http import host_port
from isthmus.protocol.address import is_local
from isthmus.protocol.bearer import TOKENS, TokenList
from isthmus.protocol.errors import ServiceError
from isthmus.protocol.keys import AllowList, KeyPair, default_folder, keys_option

if TYPE_CHECKING:
    from isthmus.apps.openai.beside import Beside


@dataclass(frozen=True, slots=True)
class OpenAiPort:
    """What was asked for, checked.

    Attributes:
        address: HOST:PORT.
        bundles: folders of the models that are served there.
        tokens: the list of bearer tokens.
        certificate, key: files for TLS; None for none.
    """

    address: str
    bundles: tuple[Path, ...]
    tokens: Path
    certificate: Path | None
    key: Path | None

    def open(self, cloud: str, pair: KeyPair | None, allowed: AllowList | None) -> Beside:
        """Begins to answer there, for a cloud that listens.

        Raises:
            ServiceError: it cannot.
        """
        from isthmus.apps.openai.beside import Beside
        from isthmus.apps.openai.settings import Settings

        settings = Settings(
            self.address,
            _within(cloud),
            pair.public if pair is not None else "",
            tuple(map(str, self.bundles)),
            str(self.tokens),
            is_local(f"tcp://{self.address}"),
            str(self.certificate or ""),
            str(self.key or ""),
        )
        return Beside(settings, allowed)

    def shown(self, port: int) -> str:
        """Where clients find it."""
        host = self.address.rpartition(":")[0]
        return f"http{'s' if self.certificate else ''}://{host}:{port}/v1"

    @property
    def guarded(self) -> bool:
        """Whether clients need a token."""
        return bool(TokenList(self.tokens).entries())


def checked(
    address: str,
    certificate: Path | None,
    key: Path | None,
    bundles: Sequence[Path],
    keys: Path | None,
) -> OpenAiPort:
    """Makes sure that it can be answered there, and is not open to everybody.

    Raises:
        ServiceError: it cannot, or would be.
        ProtocolError: the list of tokens cannot be read.
    """
    from isthmus.apps.openai.beside import check_installed
    from isthmus.apps.openai.sockets import OPTION, bound

    check_installed()
    host_port(address, OPTION)
    if not bundles:
        raise ServiceError(f"{OPTION} has no effect: no language model is served", "name its bundle")
    if (certificate is None) != (key is None):
        raise ServiceError("--tls-cert and --tls-key go together", "name both, or none")
    if certificate is not None and key is not None:
        _check_certificate(certificate, key)
    folder = keys or default_folder()
    tokens = TokenList(folder / TOKENS)
    if not is_local(f"tcp://{address}"):
        if certificate is None:
            remedy = "name a certificate with --tls-cert and --tls-key, or listen on 127.0.0.1 behind a proxy"
            raise ServiceError(f"{address} can be reached from outside, and would be read on the way", remedy)
        if not tokens.entries():
            remedy = f"run: isthmus keys token NAME{keys_option(folder)}"
            raise ServiceError(f"{address} can be reached from outside and there are no tokens", remedy)
    bound(address).close()
    return OpenAiPort(address, tuple(bundles), tokens.path, certificate, key)


def _check_certificate(certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        if not path.is_file():
            raise ServiceError(f"there is no file {path}", "name a certificate and its key, both in PEM form")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # as ssl's errors are
        why = error.strerror or str(error)
        raise ServiceError(
            f"{certificate} and {key} cannot be used: {why}",
            "name a certificate and its key, both in PEM form and without a passphrase",
        ) from error


def _within(cloud: str) -> str:
    """The address of a cloud as this machine itself reaches it."""
    for anywhere, here in (("tcp://0.0.0.0:", "tcp://127.0.0.1:"), ("tcp://[::]:", "tcp://[::1]:")):
        cloud = cloud.replace(anywhere, here)
    return cloud.replace("tcp://*:", "tcp://127.0.0.1:")
