"""TLS contexts: the one place that builds them, keeps the protocol floor, and gets key material into ``ssl`` unseen.

``ssl`` loads certificates and keys from paths only. They are written to an anonymous in-memory file that has no name in
any directory and is gone once its descriptor is closed, so no private key ever touches a disk.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable

from cryptography import x509

from caserver.fields import Secret

# For listeners that still take TLS 1.2: forward secrecy and authenticated encryption only.
_TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

TLS13 = ssl.TLSVersion.TLSv1_3
TLS12 = ssl.TLSVersion.TLSv1_2


def server_context(
    cert_chain_pem: str,
    key_pem: Secret,
    *,
    ca_pems: Iterable[str] = (),
    require_client: bool = True,
    minimum: ssl.TLSVersion = TLS13,
) -> ssl.SSLContext:
    """A context for accepting connections.

    ``cert_chain_pem`` begins with the server's own certificate. With ``require_client`` a peer must present a certificate
    that leads to one of ``ca_pems``; otherwise one that it presents is verified only if ``ca_pems`` is not empty. Names
    are not compared: ask ``peer_uri`` who is there. ``ssl.SSLError`` or ValueError if the material does not fit together.
    """
    authorities = tuple(ca_pems)
    context = _floor(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), minimum)
    _load_identity(context, cert_chain_pem, key_pem)
    if require_client and not authorities:
        raise ValueError("a server that requires client certificates needs CA certificates to verify them")
    if authorities:
        context.load_verify_locations(cadata="\n".join(authorities))
        context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    return context


def client_context(
    cert_chain_pem: str | None,
    key_pem: Secret | None,
    *,
    ca_pems: Iterable[str],
    check_hostname: bool = False,
    minimum: ssl.TLSVersion = TLS13,
) -> ssl.SSLContext:
    """A context for connecting to a server whose certificate leads to one of ``ca_pems``.

    Peers of the mesh and of the cluster are known by their URI, so names are compared only if ``check_hostname`` says so.
    Without certificate and key the client stays anonymous. No ``ca_pems`` at all trusts nobody.
    """
    context = _floor(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), minimum)
    context.check_hostname = check_hostname
    context.verify_mode = ssl.CERT_REQUIRED
    authorities = "\n".join(ca_pems)
    if authorities:
        context.load_verify_locations(cadata=authorities)
    if cert_chain_pem is not None and key_pem is not None:
        _load_identity(context, cert_chain_pem, key_pem)
    return context


def _floor(context: ssl.SSLContext, minimum: ssl.TLSVersion) -> ssl.SSLContext:
    if minimum < TLS12:
        raise ValueError("TLS below 1.2 is not offered")
    context.minimum_version = minimum
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if minimum < TLS13:
        context.set_ciphers(_TLS12_CIPHERS)
    return context


def _load_identity(context: ssl.SSLContext, cert_chain_pem: str, key_pem: Secret) -> None:
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as memory:
        memory.write(key_pem.reveal().encode() + b"\n" + cert_chain_pem.encode())
        memory.flush()
        # A password of no characters keeps OpenSSL from asking the terminal for that of an encrypted key.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")


def peer_uris(connection: ssl.SSLObject | ssl.SSLSocket) -> tuple[str, ...]:
    """All URI names in the certificate of the verified peer; empty if it presented none."""
    der = connection.getpeercert(binary_form=True)
    names = None if der is None else _names(x509.load_der_x509_certificate(der))
    return () if names is None else tuple(names.get_values_for_type(x509.UniformResourceIdentifier))


def dns_names(chain_pem: str) -> tuple[str, ...]:
    """The DNS names in the first certificate of a PEM chain; ValueError if there is no certificate."""
    names = _names(x509.load_pem_x509_certificate(chain_pem.encode()))
    return () if names is None else tuple(names.get_values_for_type(x509.DNSName))


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return None


def peer_uri(connection: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The one URI of the verified peer; None if it has no certificate, or one with no URI or with several."""
    uris = peer_uris(connection)
    return uris[0] if len(uris) == 1 else None
