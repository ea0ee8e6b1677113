"""Certificate signing requests: made here for this node's services, checked here when they come from anywhere.

A checked request contributes two things to a leaf, the service that it names and its public key. Nothing else of it is
ever copied into a certificate, so that a second name or an extension has no way in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from caserver.environment import PrivateKey
from caserver.errors import InvalidCSR
from caserver.pki import keys
from caserver.pki.spiffe import NAMESPACE, ServiceID, parse_service_uri

MAX_CSR_CHARS = 16 * 1024  # an RSA-8192 request with a URI of 2 KiB has 7 KiB in PEM
LEAF_CURVES = ("secp256r1", "secp384r1", "secp521r1")

_BEGIN = "-----BEGIN "
_LABEL = re.compile(r"-----BEGIN ([^-\n]*)-----")
_LABELS = ("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
# PKCS#9 extensionRequest and Microsoft's own: attributes that carry extensions.
_EXTENSION_REQUESTS = frozenset(map(x509.ObjectIdentifier, ("1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14")))
_KEY_POLICY = "EC keys on P-256, P-384 or P-521 and RSA keys of 2048 bits and more are signed"


def make_csr(key: PrivateKey, spiffe_uri: str) -> str:
    """A request in PEM for one SPIFFE URI: empty subject, the URI as a critical SAN."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    if keys.is_ec(key):
        request = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    else:
        request = builder.sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


@dataclass(frozen=True, slots=True)
class CheckedCSR:
    """A request that proved possession of its key and asks for exactly one service of this CA."""

    service_id: ServiceID
    public_key: bytes  # SubjectPublicKeyInfo, DER
    pem: str  # written anew from what was parsed: one block, nothing around it


def check_csrs(pems: Sequence[str], *, trust_domain: str, datacenter: str) -> list[CheckedCSR | InvalidCSR]:
    """Check each request on its own merits; the result stands at the index of its request."""
    return [_checked(pem, trust_domain=trust_domain, datacenter=datacenter) for pem in pems]


def _checked(pem: str, *, trust_domain: str, datacenter: str) -> CheckedCSR | InvalidCSR:
    try:
        request = _parse(pem)
        public_key = _sound_key(request)
        service_id = parse_service_uri(_only_uri(request))
        _refuse_foreign(service_id, trust_domain=trust_domain, datacenter=datacenter)
    except InvalidCSR as refused:
        return refused
    return CheckedCSR(service_id, keys.public_key_der(public_key), request.public_bytes(Encoding.PEM).decode())


def _parse(pem: str) -> x509.CertificateSigningRequest:
    if len(pem) > MAX_CSR_CHARS:
        raise InvalidCSR(f"the CSR has {len(pem)} characters; at most {MAX_CSR_CHARS} are read")
    label = _LABEL.search(pem)
    if label is None:
        raise InvalidCSR("no PEM-encoded data found; send the certificate request in PEM")
    if label[1] not in _LABELS:
        raise InvalidCSR("first PEM-block should be CERTIFICATE REQUEST type")
    if pem.count(_BEGIN) != 1:
        raise InvalidCSR("the CSR holds several PEM blocks; send each request by itself")
    try:
        return x509.load_pem_x509_csr(pem.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as exc:
        raise InvalidCSR("the CSR cannot be parsed: the PEM block does not hold a PKCS#10 request") from exc


def _sound_key(request: x509.CertificateSigningRequest) -> keys.PublicKey:
    """The public key, once the policy allows it and the request is signed with it."""
    try:
        public_key = request.public_key()
        algorithm = request.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise InvalidCSR(f"the CSR's key or signature is of an unsupported kind; {_KEY_POLICY}") from exc
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        fault = None if public_key.curve.name in LEAF_CURVES else f"its curve is {public_key.curve.name}"
    elif isinstance(public_key, rsa.RSAPublicKey):
        fault = keys.rsa_fault(public_key)
    else:
        raise InvalidCSR(f"unsupported key type in the CSR; {_KEY_POLICY}")
    if fault is not None:
        raise InvalidCSR(f"the CSR's key is refused: {fault}; {_KEY_POLICY}")
    if not isinstance(algorithm, _HASHES):
        raise InvalidCSR("the CSR is not signed with SHA-256, SHA-384 or SHA-512")
    _prove_possession(request)
    return public_key


def _prove_possession(request: x509.CertificateSigningRequest) -> None:
    try:
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        signed = False
    if not signed:
        raise InvalidCSR("the CSR's signature does not verify with its own key: possession of the key is not proven")


def _only_uri(request: x509.CertificateSigningRequest) -> str:
    """The one URI SAN of a request that has no other name and does not ask to be a CA."""
    try:
        requests = sum(attribute.oid in _EXTENSION_REQUESTS for attribute in request.attributes)
        extensions = request.extensions if requests <= 1 else None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
        raise InvalidCSR("the attributes and extensions of the CSR cannot be read") from exc
    if extensions is None:
        raise InvalidCSR("the CSR holds more than one extension request")
    constraints = [each.value for each in extensions if isinstance(each.value, x509.BasicConstraints)]
    if any(each.ca for each in constraints):
        raise InvalidCSR("the CSR asks for a CA certificate; only leaves are signed")
    names = [name for each in extensions if isinstance(each.value, x509.SubjectAlternativeName) for name in each.value]
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if len(uris) != 1:
        raise InvalidCSR(f"CSR SAN contains an invalid number of URIs: {len(uris)}; exactly one SPIFFE ID is needed")
    if any(isinstance(name, x509.RFC822Name) for name in names):
        raise InvalidCSR("CSR SAN does not allow specifying email addresses")
    if len(names) != 1:
        raise InvalidCSR("CSR SAN holds other names beside the SPIFFE ID; only the one URI is allowed")
    return uris[0]


def _refuse_foreign(service_id: ServiceID, *, trust_domain: str, datacenter: str) -> None:
    if service_id.trust_domain != trust_domain.lower():
        raise InvalidCSR(
            f"SPIFFE ID in CSR from a different trust domain: {service_id.trust_domain}, we are {trust_domain}"
        )
    if service_id.datacenter != datacenter:
        raise InvalidCSR(f"SPIFFE ID in CSR from a different datacenter: {service_id.datacenter}, we are {datacenter}")
    if service_id.namespace != NAMESPACE:
        raise InvalidCSR(
            f"SPIFFE ID in CSR from a different namespace: {service_id.namespace}, only {NAMESPACE} exists"
        )
