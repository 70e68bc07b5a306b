"""How the processes of one deployment know each other: a shared token, and certificates where they are
configured (`network.tls`). docs/security.md says what is protected by which of them.
"""

import hmac
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pdserve.config import TlsConfig
from pdserve.contract.errors import ConfigError

TOKEN_BYTES = 32
_MAX_FLIGHTS = 8
"""More than any handshake has."""


@dataclass(frozen=True, slots=True)
class _Token:
    """A secret that callers present. It travels to the processes of a deployment in the arguments of their
    actors. Nothing shows it: no repr, log, error or metric."""

    secret: str = field(repr=False)

    @classmethod
    def draw(cls) -> Self:
        return cls(secrets.token_urlsafe(TOKEN_BYTES))

    def matches(self, presented: str | bytes) -> bool:
        """Whether `presented` is the secret, in a time that does not tell how much of it is right."""
        raw = presented if isinstance(presented, bytes) else presented.encode(errors="replace")
        return hmac.compare_digest(self.secret.encode(), raw)


class DeploymentToken(_Token):
    """What every call between routers and workers of a deployment carries."""

    __slots__ = ()


class AdminToken(_Token):
    """What operators show to the routers' admin servers. Only `pdserve admin` tells it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What a process shows to its peers, and what it demands of theirs. PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    name: str
    """Which name the peers' certificates must carry."""

    @classmethod
    def read(cls, config: TlsConfig) -> "TlsIdentity | None":
        """None when TLS is not configured. Raises ConfigError that names the file and the fix, also for
        files that peers with the same ones would refuse."""
        if config.certificate is None or config.key is None or config.authority is None:
            return None
        contents = [
            _read(Path(path), f"network.tls.{key}")
            for key, path in (
                ("certificate", config.certificate),
                ("key", config.key),
                ("authority", config.authority),
            )
        ]
        _require_accepted_by_itself(config.certificate, config.key, config.authority, config.name)
        certificate, key, authority = contents
        return cls(certificate, key, authority, config.name)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process needs to call the others of its deployment and to be called by them."""

    token: DeploymentToken
    tls: TlsIdentity | None = None
    """None: calls are not encrypted, and stay within private networks (see `pdserve.rpc.addresses`)."""


def _read(file: Path, key: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {file} ({error.strerror}): every node needs the file at the path of {key}",
            param=key,
        ) from error


def _require_accepted_by_itself(certificate: str, key: str, authority: str, name: str) -> None:
    """Shake hands with ourselves, in memory: so a wrong file is named here, at the start, and not later in
    the words of a peer."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (client, server):
        _load_identity(context, certificate, key)
        _load_authority(context, authority)
    try:
        _shake_hands(client, server, name)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        raise ConfigError(
            f"the certificate {certificate} is not accepted ({reason}): it must be signed by {authority}, be "
            f"valid now, carry the name {name!r} of network.tls.name, and serve for both servers and "
            "clients; docs/security.md shows how to make one",
            param="network.tls.certificate",
        ) from error


def _load_identity(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(certificate, key, password="")  # so that nobody is asked for one
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate and its key in PEM form, without a password "
            f"({error.reason or error}): check network.tls.certificate and network.tls.key",
            param="network.tls.key",
        ) from error


def _load_authority(context: ssl.SSLContext, authority: str) -> None:
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{authority} holds no certificate in PEM form ({error.reason or error}): check "
            "network.tls.authority",
            param="network.tls.authority",
        ) from error


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Raises ssl.SSLError when either refuses the other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(_MAX_FLIGHTS):
        ends = _still_waiting(ends)


def _still_waiting(ends: Sequence[ssl.SSLObject]) -> list[ssl.SSLObject]:
    """Let each go on as far as it can; those that need more from the other."""
    waiting = []
    for end in ends:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(end)
    return waiting
