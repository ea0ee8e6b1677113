"""Who a node is to the others: a certificate made in memory from the cluster secret.

Each node signs its own certificate with the inter-node CA key of the current secret and trusts the CA keys of all
secrets. The name is in a URI (``spiffe://caserver.internal/node/<name>``) and nowhere else; addresses prove nothing.
Validity is that of the secret, so these certificates never expire and no clock jump can cut the cluster apart.
This CA is never a root of the mesh.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Collection
from datetime import UTC, datetime
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from caserver.fields import Secret
from caserver.internode.keyring import Keyring
from caserver.pki import tls

URI_PREFIX = "spiffe://caserver.internal/node/"
_NOT_BEFORE = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 4.1.2.5: no well-defined expiry
_SERIAL_BYTES = 16


def node_uri(node: str) -> str:
    """The URI that names ``node`` in its certificate."""
    return URI_PREFIX + quote(node, safe="")


class NodeIdentity:
    """This node's certificate and what it takes to recognise the other nodes."""

    def __init__(self, keyring: Keyring, node: str, peers: Collection[str]) -> None:
        """``peers`` are the names of all nodes; this node's own may be among them."""
        self.node = node
        self._names = frozenset(peers) | {node}
        authorities = [_authority(key, key_id) for key, key_id in zip(keyring.ca_keys, keyring.key_ids, strict=True)]
        key = keyring.node_key(node)
        self._chain_pem = _pem(_node_certificate(node, key, issuer=authorities[0], issuer_key=keyring.ca_keys[0]))
        self._key_pem = Secret(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode()
        )
        self._authorities_pem = tuple(_pem(each) for each in authorities)

    def __repr__(self) -> str:
        return f"NodeIdentity({self.node!r})"

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for listening: presents this node, demands a certificate of the same cluster secret."""
        return tls.server_context(self._chain_pem, self._key_pem, ca_pems=self._authorities_pem)

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 for dialling; host names are not checked, ``peer_name`` must be."""
        return tls.client_context(self._chain_pem, self._key_pem, ca_pems=self._authorities_pem)

    def peer_name(self, connection: ssl.SSLObject | ssl.SSLSocket | None) -> str | None:
        """The name of the node at the other end of a finished handshake; None unless it is one of the listed nodes."""
        uri = tls.peer_uri(connection) if connection is not None else None
        if uri is None or not uri.startswith(URI_PREFIX):
            return None
        node = unquote(uri.removeprefix(URI_PREFIX))
        return node if node in self._names and uri == node_uri(node) else None


def _authority(key: ec.EllipticCurvePrivateKey, key_id: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"caserver nodes {key_id}")])
    return (
        _builder(subject, key.public_key(), issuer=subject, serial_of=f"authority {key_id}")
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )


def _node_certificate(
    node: str, key: ec.EllipticCurvePrivateKey, *, issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "caserver node")])  # a name may exceed 64 characters
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(subject, key.public_key(), issuer=issuer.subject, serial_of=f"node {node}")
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(node_uri(node))]), critical=False)
        .sign(issuer_key, hashes.SHA256(), ecdsa_deterministic=True)
    )


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, *, issuer: x509.Name, serial_of: str
) -> x509.CertificateBuilder:
    # Serials need only differ per issuer, and nothing ever revokes one of these: they are hashes of what they number.
    serial = int.from_bytes(hashlib.sha256(serial_of.encode()).digest()[:_SERIAL_BYTES]) >> 1 or 1
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
