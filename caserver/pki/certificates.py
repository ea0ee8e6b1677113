"""Certificate profiles: what a root, a cross-signed root and a leaf look like, and what an operator's root must look like.

Profiles follow Consul's (recorded), with these repairs: serials are random, a cross-signed certificate never outlives
its issuer or its subject, and an operator's root that would break the mesh is refused with the commands that make a good
one. Certificates go in and out as PEM; instants, serials and keys are arguments.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from caserver.environment import PrivateKey
from caserver.errors import InvalidConfig, ProviderRefused
from caserver.fields import Fault, format_go_duration
from caserver.pki import keys
from caserver.pki.spiffe import leaf_common_name, signing_uri

ROOT_NAME_LETTERS = 8  # base 36, after "pri-"
SERIAL_BYTES = 16
_SERIAL_END = 1 << 159  # RFC 5280 4.1.2.2: 20 bytes at most, the first bit being the sign

_PRINTABLE = re.compile(r"[A-Za-z0-9 '()+,./:=?-]+")  # what an ASN.1 PrintableString may hold
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_PEM_LABEL = re.compile(r"-----BEGIN ([^-\n]+)-----")
# What belongs to the issuer of a certificate and not to its subject: a cross-signed copy leaves it behind.
_ISSUERS_OWN = frozenset(
    {
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
        ExtensionOID.CRL_DISTRIBUTION_POINTS,
        ExtensionOID.FRESHEST_CRL,
    }
)

ROOT_KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
LEAF_KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=True,
    data_encipherment=True,
    key_agreement=True,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
LEAF_EXTENDED_KEY_USAGE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def serial_from(raw16: bytes) -> int:
    """A positive serial of exactly 127 bits, 126 of them random, from 16 random bytes (RFC 5280 4.1.2.2)."""
    if len(raw16) != SERIAL_BYTES:
        raise ValueError("a serial is made of 16 bytes")
    return int.from_bytes(raw16, "big") & (2**126 - 1) | 2**126


def root_common_name(trust_domain: str, raw: bytes, *, provider: str = "consul") -> str:
    """``pri-<8 of base 36>.<provider>.ca.<8 of the cluster id>.consul``; ``raw`` is 8 or more bytes."""
    number = int.from_bytes(raw, "big")
    letters = ""
    for _ in range(ROOT_NAME_LETTERS):
        number, digit = divmod(number, len(_BASE36))
        letters += _BASE36[digit]
    return f"pri-{letters}.{provider}.ca.{trust_domain[:8]}.consul"


@lru_cache(maxsize=256)
def load_certificate(pem: str) -> x509.Certificate:
    """The certificate in a PEM text; InvalidConfig with Consul's texts for a root that cannot be read."""
    label = _PEM_LABEL.search(pem)
    if label is None:
        raise InvalidConfig("error parsing root fingerprint: no PEM-encoded data found")
    if label[1] != "CERTIFICATE":
        raise InvalidConfig("error parsing root fingerprint: first PEM-block should be CERTIFICATE type")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about serial numbers that are not positive: roots are refused for them
            certificate = x509.load_pem_x509_certificate(pem.encode())
        # Parsed at first use: whoever holds the result need not fear that.
        _ = (*certificate.extensions, certificate.subject, certificate.issuer)
        _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
        raise InvalidConfig("error parsing root cert: asn1: structure error: the block is not a certificate") from exc
    return certificate


def _public_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None  # a kind that cryptography does not know either


def _signature_hash(certificate: x509.Certificate) -> hashes.HashAlgorithm | None:
    try:
        return certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None


def to_pem(certificate: x509.Certificate) -> str:
    """PEM with a final newline."""
    return certificate.public_bytes(Encoding.PEM).decode()


def extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """The extension of this kind, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def uri_sans(certificate: x509.Certificate) -> tuple[str, ...]:
    """All URI names of a certificate."""
    names = extension(certificate, x509.SubjectAlternativeName)
    return () if names is None else tuple(names.get_values_for_type(x509.UniformResourceIdentifier))


def key_id(certificate: x509.Certificate) -> bytes | None:
    """Subject key identifier, or None."""
    value = extension(certificate, x509.SubjectKeyIdentifier)
    return None if value is None else value.digest


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What the state and the API need to know of a certificate; instants are epoch seconds."""

    id: str  # SHA-1 of the DER, lower hex with colons (Consul's root id)
    serial: int
    not_before: int
    not_after: int
    key_type: str  # "ec" | "rsa"
    key_bits: int
    signing_key_id: str  # subject key identifier, lower hex with colons; empty if there is none
    subject: str  # RFC 4514
    issuer: str  # RFC 4514
    uri_sans: tuple[str, ...]
    is_ca: bool


@lru_cache(maxsize=256)
def describe(pem: str) -> CertificateFacts:
    """Facts of one certificate; InvalidConfig with Consul's texts if it cannot be read or its key is of another kind."""
    certificate = load_certificate(pem)
    kind, bits = keys.key_info(_public_key(certificate))
    constraints = extension(certificate, x509.BasicConstraints)
    return CertificateFacts(
        id=keys.colon_hex(hashlib.sha1(certificate.public_bytes(Encoding.DER), usedforsecurity=False).digest()),
        serial=certificate.serial_number,
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        key_type=kind,
        key_bits=bits,
        signing_key_id=keys.colon_hex(key_id(certificate) or b""),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        uri_sans=uri_sans(certificate),
        is_ca=constraints is not None and constraints.ca,
    )


def make_root(
    key: PrivateKey, *, trust_domain: str, common_name: str, serial: int, not_before: datetime, not_after: datetime
) -> str:
    """A self-signed root for the trust domain; EC signatures are deterministic (RFC 6979)."""
    public_key = key.public_key()
    # Vault writes the name of a cross-signed root anew, as Go does: a name that it would write otherwise keeps verifiers
    # that compare bytes from taking one for the other.
    kind = _ASN1Type.PrintableString if _PRINTABLE.fullmatch(common_name) else _ASN1Type.UTF8String
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name, kind)])
    key_identifier = x509.SubjectKeyIdentifier(keys.subject_key_id(public_key))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(ROOT_KEY_USAGE, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_identifier), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(signing_uri(trust_domain))]), critical=False
        )
    )
    return to_pem(sign_certificate(builder, key, keys.root_hash(key)))


def sign_certificate(
    builder: x509.CertificateBuilder, key: PrivateKey, algorithm: hashes.SHA256 | hashes.SHA384 | hashes.SHA512
) -> x509.Certificate:
    """Sign with RSA PKCS#1 v1.5 or deterministic ECDSA, so that no randomness enters below ``Entropy``."""
    if keys.is_ec(key):
        return builder.sign(key, algorithm, ecdsa_deterministic=True)
    return builder.sign(key, algorithm)


def issuer_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier | None:
    """The authority key identifier of what ``issuer`` signs; None if it has no subject key identifier."""
    digest = key_id(issuer)
    return None if digest is None else x509.AuthorityKeyIdentifier(digest, None, None)


def cross_sign(
    certificate_pem: str,
    *,
    issuer_pem: str,
    issuer_key: PrivateKey,
    serial: int,
    not_before: datetime,
    not_after: datetime,
) -> str:
    """A certificate with the subject, key and extensions of ``certificate_pem``, signed by ``issuer_pem``'s key.

    Keys of any two kinds go together. What describes the former issuer (AKI, CRL and AIA pointers) is replaced or left
    out. The validity is cut to that of issuer and subject, so that no verifier meets a certificate that outlives its
    issuer; ProviderRefused if nothing is left of it.
    """
    target = load_certificate(certificate_pem)
    issuer = load_certificate(issuer_pem)
    starts = max(not_before, issuer.not_valid_before_utc)
    ends = min(not_after, issuer.not_valid_after_utc, target.not_valid_after_utc)
    if ends <= starts:
        raise ProviderRefused(
            f"cannot cross-sign: the root {issuer.subject.rfc4514_string()} is valid until "
            f"{issuer.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ} and the new root until "
            f"{target.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}; set ForceWithoutCrossSigning to rotate without it"
        )
    builder = (
        x509.CertificateBuilder()
        .subject_name(target.subject)
        .issuer_name(issuer.subject)
        .public_key(target.public_key())
        .serial_number(serial)
        .not_valid_before(starts)
        .not_valid_after(ends)
    )
    for each in _subjects_extensions(target):
        builder = builder.add_extension(each.value, each.critical)
    authority = issuer_key_identifier(issuer)
    if authority is not None:
        builder = builder.add_extension(authority, critical=False)
    return to_pem(sign_certificate(builder, issuer_key, hashes.SHA256()))


def _subjects_extensions(certificate: x509.Certificate) -> list[x509.Extension[x509.ExtensionType]]:
    return [each for each in certificate.extensions if each.oid not in _ISSUERS_OWN]


def make_root_csr(root_pem: str, key: PrivateKey) -> str:
    """A request (PEM) for a certificate with the subject, key and extensions of a root: what others cross-sign it by."""
    root = load_certificate(root_pem)
    builder = x509.CertificateSigningRequestBuilder().subject_name(root.subject)
    for each in _subjects_extensions(root):
        builder = builder.add_extension(each.value, each.critical)
    if keys.is_ec(key):
        request = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    else:
        request = builder.sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


@dataclass(frozen=True, slots=True)
class LeafTemplate:
    """Everything variable in a leaf; instants are epoch seconds."""

    spiffe_uri: str  # canonical, ASCII
    common_name: str  # empty = no subject, and then the SAN is critical (RFC 5280 4.2.1.6)
    public_key: bytes  # SubjectPublicKeyInfo, DER
    serial: int
    not_before: int
    not_after: int


def leaf_builder(template: LeafTemplate, issuer: x509.Certificate) -> x509.CertificateBuilder:
    """The leaf profile, unsigned: the reference that the fast path of ``leaf_der`` must equal byte for byte."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, template.common_name)] if template.common_name else []
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(template.spiffe_uri)])
    digest = hashlib.sha256(template.public_key).digest()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(issuer.subject)
        .public_key(load_der_public_key(template.public_key))  # type: ignore[arg-type]  # kinds are checked with the CSR
        .serial_number(template.serial)
        .not_valid_before(datetime.fromtimestamp(template.not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(template.not_after, UTC))
        .add_extension(LEAF_KEY_USAGE, critical=True)
        .add_extension(LEAF_EXTENDED_KEY_USAGE, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(digest), critical=False)
    )
    authority = issuer_key_identifier(issuer)
    if authority is not None:
        builder = builder.add_extension(authority, critical=False)
    return builder.add_extension(names, critical=not template.common_name)


# --- An operator's root -------------------------------------------------------------------------------------------------

_ROOT = "RootCert"
_MAY_BE_CRITICAL = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
    }
)
_SOUND_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


def operator_root_commands(trust_domain: str, now: datetime) -> str:
    """Shell lines that make ``root.key`` and ``root.crt``, a root which ``operator_root_faults`` accepts.

    They stand for themselves: no openssl.cnf is read. The instant in the name keeps two such roots apart, because chains
    are found by name first.
    """
    return (
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out root.key\n"
        "openssl req -x509 -new -config /dev/null -key root.key -sha256 -days 3650"
        f' -subj "/CN=Connect CA Root {now:%Y%m%d%H%M%S}"'
        ' -addext "basicConstraints=critical,CA:TRUE"'
        ' -addext "keyUsage=critical,digitalSignature,keyCertSign,cRLSign"'
        ' -addext "subjectKeyIdentifier=hash"'
        f' -addext "subjectAltName=URI:{signing_uri(trust_domain)}"'
        " -out root.crt"
    )


def operator_root_faults(
    pem: str, key: PrivateKey | None, *, trust_domain: str, now: datetime, leaf_ttl: int | None
) -> list[Fault]:
    """Everything that keeps an operator's root from signing leaves that every verifier of the mesh accepts.

    ``key`` None compares no key (it lives elsewhere); ``leaf_ttl`` is in seconds, None judges no validity at ``now``. An
    empty list accepts. The remedy of the last fault ends in commands that make a root without any of them. Sources:
    RFC 5280 4.2.1, SPIFFE X509-SVID 4.
    """
    faults = _root_faults(pem, key, trust_domain=trust_domain, now=now, leaf_ttl=leaf_ttl)
    if not faults:
        return []
    commands = operator_root_commands(trust_domain, now)
    guide = (
        "the following commands make a key and a root that are accepted (leave out the first one to keep the key in "
        f"root.key; then give root.key as PrivateKey and root.crt as RootCert):\n{commands}"
    )
    last = faults[-1]
    remedy = f"{last.remedy}; {guide}" if last.remedy else guide
    return [*faults[:-1], replace(last, remedy=remedy)]


def _root_faults(
    pem: str, key: PrivateKey | None, *, trust_domain: str, now: datetime, leaf_ttl: int | None
) -> list[Fault]:
    try:
        certificate = load_certificate(pem)
    except InvalidConfig as refused:
        return [Fault(_ROOT, "no certificate can be read from it", "give one root certificate in PEM", refused.detail)]
    return [
        *_surroundings_faults(pem),
        *_number_faults(certificate),
        *_key_faults(_public_key(certificate), key),
        *_signature_faults(certificate),
        *_authority_faults(certificate),
        *_identifier_faults(certificate),
        *_name_faults(certificate, signing_uri(trust_domain)),
        *([] if leaf_ttl is None else _validity_faults(certificate, now, leaf_ttl)),
    ]


def _surroundings_faults(pem: str) -> list[Fault]:
    text = pem.strip()
    count = len(_PEM_LABEL.findall(text))
    if count > 1:
        return [Fault(_ROOT, f"holds {count} PEM blocks", "give the root certificate alone")]
    if not text.startswith("-----BEGIN ") or not text.endswith("-----END CERTIFICATE-----"):
        return [Fault(_ROOT, "has text around the certificate", "give the PEM block alone")]
    return []


def _number_faults(certificate: x509.Certificate) -> list[Fault]:
    """RFC 5280 4.1.2.1 and 4.1.2.2; verifiers refuse what breaks them, each in its own way."""
    faults = []
    if certificate.version is not x509.Version.v3:
        faults.append(Fault(_ROOT, "is of X.509 version 1, which has no extensions", "make it of version 3"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a serial number that is not positive: that is what is asked here
        serial = certificate.serial_number
    if not 0 < serial < _SERIAL_END:
        faults.append(Fault(_ROOT, "its serial number is not a positive one of 20 bytes at most", "choose another"))
    return faults


def _key_faults(public_key: object, key: PrivateKey | None) -> list[Fault]:
    if not isinstance(public_key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        heading = "error extracting root key info: unsupported key type"
        return [Fault(_ROOT, "its key is neither EC nor RSA", "make a root with an EC or RSA key", heading)]
    fault = keys.public_key_fault(public_key)
    if fault is not None:
        return [Fault(_ROOT, f"its key is refused: {fault}", "make a root with a key of P-256 or RSA-2048 or better")]
    if key is not None and keys.public_key_der(key.public_key()) != keys.public_key_der(public_key):
        return [
            Fault("PrivateKey", "does not belong to RootCert", "give the key that the root certificate was made with")
        ]
    return []


def _signature_faults(certificate: x509.Certificate) -> list[Fault]:
    if not certificate.subject.rdns:
        return [Fault(_ROOT, "its subject is empty", "give the root a common name")]
    if certificate.subject.public_bytes() not in certificate.tbs_certificate_bytes:
        return [
            Fault(_ROOT, "its subject is encoded in a way that cannot be repeated in what it signs", "use a plain name")
        ]
    if not isinstance(_signature_hash(certificate), _SOUND_HASHES):
        return [Fault(_ROOT, "is not signed with SHA-256, SHA-384 or SHA-512", "sign it with SHA-256")]
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return [Fault(_ROOT, "is not self-signed", "give a root, not an intermediate CA certificate")]
    return []


def _authority_faults(certificate: x509.Certificate) -> list[Fault]:
    """What must be there for verifiers to take it as a CA."""
    faults = []
    constraints = extension(certificate, x509.BasicConstraints)
    if constraints is None:
        faults.append(Fault(_ROOT, "has no Basic Constraints", "make it with basicConstraints=critical,CA:TRUE"))
    elif not constraints.ca:
        faults.append(Fault(_ROOT, "is not a CA (CA:FALSE)", "make it with basicConstraints=critical,CA:TRUE"))
    elif constraints.path_length is not None:
        problem = f"limits the path length to {constraints.path_length}, which cross-signed chains exceed"
        faults.append(Fault(_ROOT, problem, "make it without pathlen"))
    elif not certificate.extensions.get_extension_for_class(x509.BasicConstraints).critical:
        faults.append(Fault(_ROOT, "its Basic Constraints are not critical", "write critical,CA:TRUE"))
    usage = extension(certificate, x509.KeyUsage)
    if usage is None:
        faults.append(Fault(_ROOT, "has no Key Usage", "make it with keyUsage=critical,keyCertSign,cRLSign"))
    elif not usage.key_cert_sign:
        faults.append(
            Fault(_ROOT, "its Key Usage lacks keyCertSign", "make it with keyUsage=critical,keyCertSign,cRLSign")
        )
    purposes = extension(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and not set(LEAF_EXTENDED_KEY_USAGE) <= set(purposes):
        faults.append(Fault(_ROOT, "its Extended Key Usage lacks clientAuth or serverAuth", "make it without one"))
    return faults


def _identifier_faults(certificate: x509.Certificate) -> list[Fault]:
    """What must be there for verifiers to find their way along a chain."""
    faults = []
    own = key_id(certificate)
    if not own:
        faults.append(Fault(_ROOT, "has no Subject Key Identifier", "make it with subjectKeyIdentifier=hash"))
    authority = extension(certificate, x509.AuthorityKeyIdentifier)
    if own and authority is not None and authority.key_identifier not in (None, own):
        faults.append(
            Fault(_ROOT, "its Authority Key Identifier names another key", "make it with authorityKeyIdentifier=keyid")
        )
    unknown = [
        each.oid.dotted_string for each in certificate.extensions if each.critical and each.oid not in _MAY_BE_CRITICAL
    ]
    if unknown:
        problem = f"has critical extensions that proxies may not know ({', '.join(unknown)})"
        faults.append(Fault(_ROOT, problem, "make it without them"))
    return faults


def _any_leaf_name(uri: str) -> str:
    return leaf_common_name("any", uri.removeprefix(signing_uri("")))


def _name_faults(certificate: x509.Certificate, uri: str) -> list[Fault]:
    names = extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        return [
            Fault(_ROOT, f"does not carry the URI of this cluster, {uri}", f"make it with subjectAltName=URI:{uri}")
        ]
    faults = []
    if list(uri_sans(certificate)) != [uri]:
        given = ", ".join(repr(each) for each in uri_sans(certificate)) or "none"
        faults.append(
            Fault(
                _ROOT,
                f"its URI names are {given}; the only one must be {uri}",
                f"make it with subjectAltName=URI:{uri}",
            )
        )
    if len(list(names)) > len(uri_sans(certificate)):
        faults.append(
            Fault(_ROOT, "carries names beside the URI of the cluster", f"make it with subjectAltName=URI:{uri} alone")
        )
    limits = extension(certificate, x509.NameConstraints)
    if limits is not None and not permits(limits, uri=uri, common_name=_any_leaf_name(uri)):
        faults.append(Fault(_ROOT, "its Name Constraints exclude the leaves of this cluster", "make it without them"))
    return faults


def permits(limits: x509.NameConstraints, *, uri: str, common_name: str) -> bool:
    """Whether name constraints allow a leaf with this URI and common name (RFC 5280 4.2.1.10).

    URI constraints are held against the URI's host, DNS constraints against the common name, because OpenSSL takes a
    common name for a host name where there is no DNS name. A permitted directory name never covers a leaf, whose subject
    is a common name alone.
    """
    host = uri.partition("://")[2].partition("/")[0].lower()

    def covers(name: x509.GeneralName) -> bool:
        if isinstance(name, x509.UniformResourceIdentifier):
            wanted = name.value.lower()
            return host.endswith(wanted) if wanted.startswith(".") else host == wanted
        if isinstance(name, x509.DNSName):
            return f".{common_name.lower()}".endswith("." + name.value.lower().lstrip("."))
        return False

    for kind in (x509.UniformResourceIdentifier, x509.DNSName, x509.DirectoryName):
        permitted = [each for each in limits.permitted_subtrees or () if isinstance(each, kind)]
        if permitted and not any(covers(each) for each in permitted):
            return False
    return not any(covers(each) for each in limits.excluded_subtrees or ())


def _validity_faults(certificate: x509.Certificate, now: datetime, leaf_ttl: int) -> list[Fault]:
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if starts > now:
        return [
            Fault(_ROOT, f"is not yet valid: it begins at {_utc(starts)} and now is {_utc(now)}", "check the clocks")
        ]
    if ends <= now:
        return [Fault(_ROOT, f"expired at {_utc(ends)}", "make a new one")]
    if ends < now + timedelta(seconds=leaf_ttl):
        problem = f"ends at {_utc(ends)}, before a leaf of {format_go_duration(leaf_ttl)} issued now would"
        return [Fault(_ROOT, problem, "make one that lives longer, or shorten LeafCertTTL")]
    return []


def _utc(instant: datetime) -> str:
    return f"{instant:%Y-%m-%dT%H:%M:%SZ}"
