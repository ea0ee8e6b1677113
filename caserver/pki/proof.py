"""Proof before commit: real mutual TLS handshakes, in memory, between a leaf and the bundles that it will meet.

Each cell is one question, "does somebody who trusts this bundle accept this leaf, as a server and as a client?". Both
sides of its handshake hold the leaf and trust the bundle, so one mutual handshake asks both. OpenSSL answers for names,
signatures and constraints; the lifetimes are judged at the instant given, since OpenSSL would read the machine's clock.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from caserver.fields import Secret
from caserver.pki.chain import verify_chain
from caserver.pki.tls import client_context, server_context

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n?")
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of <openssl/x509_vfy.h>, which ssl does not name
_MAX_ROUNDS = 16  # a TLS 1.3 handshake takes three
_PING = b"\x00"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A leaf as a proxy presents it."""

    chain_pem: str  # the leaf, then what travels with it
    key_pem: Secret


@dataclass(frozen=True, slots=True)
class Cell:
    """One question of the proof: ``endpoint`` meets a peer that trusts ``bundle`` (root certificates, PEM)."""

    name: str  # "new leaf, old bundle"
    endpoint: Endpoint
    bundle: tuple[str, ...]


def prove(cells: Iterable[Cell], at: datetime) -> list[str]:
    """The failing cells, each as ``name: reason`` naming the certificate at fault; empty if all handshakes succeed.

    ``at`` is the instant whose validity counts. Takes about 2 ms of computing a cell: call it off the event loop.
    """
    return [f"{cell.name}: {reason}" for cell in cells if (reason := _failure(cell, at)) is not None]


def _failure(cell: Cell, at: datetime) -> str | None:
    certificates = _CERTIFICATE.findall(cell.endpoint.chain_pem)
    if not certificates:
        return "the endpoint presents no certificate"
    # Our own search comes first because it can say which certificate is at fault; OpenSSL's word counts as much.
    return verify_chain(certificates[0], certificates[1:], cell.bundle, at) or _handshake_failure(cell)


def _handshake_failure(cell: Cell) -> str | None:
    chain, key = cell.endpoint.chain_pem, cell.endpoint.key_pem
    try:
        server = server_context(chain, key, ca_pems=cell.bundle)
        client = client_context(chain, key, ca_pems=cell.bundle)
        for context in (server, client):
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        _shake_hands(server, client)
    except ssl.SSLCertVerificationError as exc:
        return f"the TLS handshake failed: {exc.verify_message}"
    except (ssl.SSLError, ValueError) as exc:
        return f"the TLS handshake failed: {getattr(exc, 'reason', None) or exc}"
    return None


class _Side:
    """One end of a connection whose wire is two memory buffers."""

    def __init__(self, context: ssl.SSLContext, *, server: bool) -> None:
        self.inbox = ssl.MemoryBIO()
        self.outbox = ssl.MemoryBIO()
        self.connection = context.wrap_bio(self.inbox, self.outbox, server_side=server)
        self.done = False

    def step(self) -> None:
        """Go as far as the bytes received allow; SSLError if the peer is not acceptable."""
        try:
            if not self.done:
                self.connection.do_handshake()
                self.done = True
                self.connection.write(_PING)
        except ssl.SSLWantReadError:
            return

    def heard(self) -> bool:
        """Whether the peer's byte has arrived: in TLS 1.3 the client learns only by this that it was accepted."""
        try:
            return self.connection.read(1) == _PING
        except ssl.SSLWantReadError:
            return False


def _shake_hands(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    """Complete a mutual handshake and exchange one byte each way; SSLError if either side refuses."""
    client, server = _Side(client_context, server=False), _Side(server_context, server=True)
    for _ in range(_MAX_ROUNDS):
        client.step()
        server.inbox.write(client.outbox.read())
        server.step()
        client.inbox.write(server.outbox.read())
        if client.done and server.done and client.heard() and server.heard():
            return
    raise ssl.SSLError("the handshake did not come to an end")
