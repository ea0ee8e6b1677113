"""Real TLS as two proxies of the mesh would do it: mutual, SPIFFE ids instead of host names, OpenSSL deciding.

Independent of the product's own proof, so that it can judge it.
"""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Proxy:
    """One side: the leaf and chain it shows, its key, and the root certificates it trusts. All PEM."""

    chain: str
    key: str
    bundle: str


@lru_cache(maxsize=64)  # all with all is many times the same; nothing is judged before the handshake
def _context(proxy: Proxy, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.check_hostname = False  # identities are URIs, checked by the caller
    context.verify_mode = ssl.CERT_REQUIRED
    # An operator's sub CA in a bundle must not become an anchor by itself: only what chains to a root counts.
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=proxy.bundle)
    with tempfile.TemporaryDirectory() as directory:
        chain, key = Path(directory, "chain.pem"), Path(directory, "key.pem")
        chain.write_text(proxy.chain)
        key.write_text(proxy.key)
        context.load_cert_chain(chain, key)
    return context


def _uris(connection: ssl.SSLObject) -> list[str]:
    certificate = connection.getpeercert() or {}
    names: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    return [value for kind, value in names if kind == "URI"]


def shake(client: Proxy, server: Proxy) -> tuple[list[str], list[str]]:
    """Mutual TLS between the two; the URIs that the client and the server saw. ssl.SSLError if either refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = _context(client, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(to_client, to_server)
    right = _context(server, ssl.PROTOCOL_TLS_SERVER).wrap_bio(to_server, to_client, server_side=True)
    waiting = [left, right]
    for _ in range(10):  # flights; TLS 1.3 needs three
        waiting = [side for side in waiting if not _advance(side)]
        if not waiting:
            break
    # With TLS 1.3 the client is done before the server has judged its certificate: an exchange proves both.
    right.write(b"hello")
    left.write(b"hello")
    assert (left.read(5), right.read(5)) == (b"hello", b"hello")
    return _uris(left), _uris(right)


def _advance(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def refuses(client: Proxy, server: Proxy) -> bool:
    """Whether the handshake fails because a certificate does not verify."""
    try:
        shake(client, server)
    except ssl.SSLCertVerificationError:
        return True
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    return False
