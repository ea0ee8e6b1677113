"""TLS contexts: the one place that builds them, keeps the protocol floor, and gets key material into ``ssl`` unseen.

``ssl`` loads certificates and keys from paths only. They are written to an anonymous in-memory file that has no name in
any directory and is gone once its descriptor is closed, so no private key ever touches a disk.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from caserver.errors import InvalidConfig
from caserver.fields import Fault, Secret, fault_text

# For listeners that still take TLS 1.2: forward secrecy and authenticated encryption only.
_TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

TLS13 = ssl.TLSVersion.TLSv1_3
TLS12 = ssl.TLSVersion.TLSv1_2
_SPELLED = {"tls12": TLS12, "tls13": TLS13}


class ServerFiles(Protocol):
    """Where the material of a listener lies, all PEM."""

    @property
    def cert_file(self) -> Path:
        """Its certificate, and the chain behind it."""
        ...

    @property
    def key_file(self) -> Path:
        """The key of that certificate."""
        ...

    @property
    def ca_file(self) -> Path | None:
        """The CAs whose client certificates are accepted."""
        ...

    @property
    def ca_path(self) -> Path | None:
        """A directory of further such CAs."""
        ...

    @property
    def verify_incoming(self) -> bool:
        """Whether a client must present one; otherwise none is asked for."""
        ...

    @property
    def min_version(self) -> str:
        """``tls12`` or ``tls13``."""
        ...

    @property
    def cipher_suites(self) -> Sequence[str]:
        """Those of TLS 1.2 by OpenSSL's names; none = all that are safe."""
        ...

    @property
    def prefer_server_ciphers(self) -> bool:
        """Whether the server's order of suites counts, not the client's."""
        ...


def context_of_files(files: ServerFiles) -> ssl.SSLContext:
    """A context for accepting connections; InvalidConfig with a line for every file that it cannot be made of."""
    faults: list[Fault] = []
    chain, key = _text_of("cert_file", files.cert_file, faults), _text_of("key_file", files.key_file, faults)
    authorities = _authorities(files, faults)
    if not faults:
        faults += _material_faults(files, chain, key)
    if faults:
        raise InvalidConfig(fault_text(faults))
    try:
        context = server_context(
            chain,
            Secret(key),
            ca_pems=authorities if files.verify_incoming else (),
            require_client=files.verify_incoming,
            minimum=_SPELLED[files.min_version],
        )
        if files.cipher_suites:
            context.set_ciphers(":".join(files.cipher_suites))
    except (ssl.SSLError, ValueError) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise InvalidConfig(f"cert_file: {files.cert_file} and {files.key_file} cannot be used: {reason}") from exc
    if not files.prefer_server_ciphers:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


def _authorities(files: ServerFiles, faults: list[Fault]) -> list[str]:
    """The CAs for client certificates, one PEM text a file, each with a certificate in it."""
    found = [] if files.ca_file is None else [("ca_file", files.ca_file)]
    if files.ca_path is not None:
        try:
            found += [("ca_path", each) for each in sorted(files.ca_path.iterdir()) if each.is_file()]
        except OSError as exc:
            problem = f"{files.ca_path} cannot be listed ({exc.strerror})"
            faults.append(Fault("ca_path", problem, "check the path and its permissions"))
    texts = []
    for name, path in found:
        count = len(faults)
        text = _text_of(name, path, faults)
        if len(faults) == count and _first_public_key(text) is None:
            faults.append(
                Fault(name, f"no certificate can be read from {path}", "give CA certificates in PEM, and nothing else")
            )
        texts.append(text)
    if files.verify_incoming and not texts and not faults:
        name = "ca_path" if files.ca_path is not None else "ca_file"
        faults.append(Fault(name, "holds no CA, and verify_incoming needs one", "give CA certificates in PEM"))
    return texts


def _text_of(name: str, path: Path, faults: list[Fault]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        faults.append(Fault(name, f"{path} cannot be read ({exc.strerror})", "check the path and its permissions"))
    except UnicodeDecodeError:
        faults.append(Fault(name, f"{path} is not PEM text", f"convert it with openssl: -inform DER -in {path}"))
    return ""


def _material_faults(files: ServerFiles, chain: str, key: str) -> list[Fault]:
    faults = []
    certified = _first_public_key(chain)
    if certified is None:
        problem = f"no certificate can be read from {files.cert_file}"
        faults.append(Fault("cert_file", problem, "give the server's certificate in PEM, then its chain"))
    try:
        held = load_pem_private_key(key.encode(), password=None).public_key()
    except TypeError:  # cryptography's word for "encrypted"
        problem = f"the key in {files.key_file} is encrypted"
        faults.append(Fault("key_file", problem, f"decrypt it with `openssl pkey -in {files.key_file} -out FILE`"))
    except (ValueError, UnsupportedAlgorithm):
        problem = f"no private key can be read from {files.key_file}"
        faults.append(Fault("key_file", problem, "give the key of the certificate in PEM"))
    else:
        spki = held.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if certified is not None and certified != spki:
            problem = f"{files.key_file} does not hold the key of the first certificate in {files.cert_file}"
            faults.append(
                Fault("key_file", problem, "give two that belong together, the server's own certificate first")
            )
    return faults


def _first_public_key(pem: str) -> bytes | None:
    """The key of the first of PEM certificates, as DER; None if one of them cannot be read, or there is none."""
    try:
        key = x509.load_pem_x509_certificates(pem.encode())[0].public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


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
    that leads to one of ``ca_pems``; otherwise it is not asked for one. Names are not compared: ask ``peer_uri`` who is
    there. ``ssl.SSLError`` or ValueError if the material does not fit together.
    """
    authorities = tuple(ca_pems)
    context = _floor(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), minimum)
    _load_identity(context, cert_chain_pem, key_pem)
    if require_client and not authorities:
        raise ValueError("a server that requires client certificates needs CA certificates to verify them")
    if require_client:
        context.load_verify_locations(cadata="\n".join(authorities))
        context.verify_mode = ssl.CERT_REQUIRED
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


def backend_context(
    *,
    ca_pems: Iterable[str] = (),
    cert_chain_pem: str | None = None,
    key_pem: Secret | None = None,
    verify: bool = True,
) -> ssl.SSLContext:
    """A context for connecting to a server that others run: by host name, TLS 1.2 or later.

    Without ``ca_pems`` the machine's own store decides; without ``verify`` anybody may answer. ``ssl.SSLError`` or
    ValueError if the material does not fit together.
    """
    context = _floor(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), TLS12)
    authorities = "\n".join(ca_pems)
    if authorities:
        context.load_verify_locations(cadata=authorities)
    else:
        context.load_default_certs()
    context.check_hostname = verify
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
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


def validity(chain_pem: str) -> tuple[datetime, datetime]:
    """From when and until when the first certificate of a PEM chain is valid; ValueError if there is no certificate."""
    certificate = x509.load_pem_x509_certificate(chain_pem.encode())
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return None


def peer_uri(connection: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The one URI of the verified peer; None if it has no certificate, or one with no URI or with several."""
    uris = peer_uris(connection)
    return uris[0] if len(uris) == 1 else None
