"""DER written by hand: CSRs and certificates that no library would make. All signatures are right unless a test breaks them."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.testkit.keys import private_key

SEQUENCE, SET, INTEGER, BIT_STRING, OCTET_STRING, NULL, OID, BOOLEAN = 0x30, 0x31, 0x02, 0x03, 0x04, 0x05, 0x06, 0x01
UTF8, PRINTABLE, IA5, UTC_TIME, GENERALIZED_TIME = 0x0C, 0x13, 0x16, 0x17, 0x18
URI_NAME, DNS_NAME, EMAIL_NAME, IP_NAME, DIRECTORY_NAME, RID_NAME, OTHER_NAME = 0x86, 0x82, 0x81, 0x87, 0xA4, 0x88, 0xA0

SAN, BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED_KEY_USAGE = "2.5.29.17", "2.5.29.19", "2.5.29.15", "2.5.29.37"
SUBJECT_KEY_ID, AUTHORITY_KEY_ID, NAME_CONSTRAINTS = "2.5.29.14", "2.5.29.35", "2.5.29.30"
EXTENSION_REQUEST, CHALLENGE_PASSWORD = "1.2.840.113549.1.9.14", "1.2.840.113549.1.9.7"
ECDSA_SHA256, ECDSA_SHA1, RSA_SHA256, RSA_MD5 = (
    "1.2.840.10045.4.3.2",
    "1.2.840.10045.4.1",
    "1.2.840.113549.1.1.11",
    "1.2.840.113549.1.1.4",
)


def tlv(tag: int, *parts: bytes) -> bytes:
    """Tag, length and content."""
    content = b"".join(parts)
    count = len(content)
    if count < 0x80:
        return bytes((tag, count)) + content
    size = (count.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + count.to_bytes(size, "big") + content


def integer(value: int) -> bytes:
    """INTEGER, negative ones included."""
    return tlv(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER."""
    first, second, *rest = map(int, dotted.split("."))
    content = bytearray()
    for arc in (40 * first + second, *rest):
        digits = [arc & 0x7F]
        while arc := arc >> 7:
            digits.append(0x80 | arc & 0x7F)
        content += bytes(reversed(digits))
    return tlv(OID, bytes(content))


def algorithm(dotted: str) -> bytes:
    """AlgorithmIdentifier without parameters."""
    return tlv(SEQUENCE, oid(dotted))


def extension(dotted: str, value: bytes, *, critical: bool = False) -> bytes:
    """Extension."""
    flag = tlv(BOOLEAN, b"\xff") if critical else b""
    return tlv(SEQUENCE, oid(dotted), flag, tlv(OCTET_STRING, value))


def name(common_name: bytes, tag: int = UTF8) -> bytes:
    """Name of one common name; an empty one is an empty Name."""
    if not common_name:
        return tlv(SEQUENCE)
    return tlv(SEQUENCE, tlv(SET, tlv(SEQUENCE, oid("2.5.4.3"), tlv(tag, common_name))))


def san(*names: tuple[int, bytes], critical: bool = False) -> bytes:
    """SubjectAlternativeName of (tag, content)."""
    return extension(SAN, tlv(SEQUENCE, *(tlv(tag, content) for tag, content in names)), critical=critical)


def uri(text: str | bytes) -> tuple[int, bytes]:
    """A URI name, whatever its bytes."""
    return URI_NAME, text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def sign(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, content: bytes) -> bytes:
    """A SHA-256 signature as BIT STRING."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        raw = key.sign(content, ec.ECDSA(hashes.SHA256()))
    else:
        raw = key.sign(content, padding.PKCS1v15(), hashes.SHA256())
    return tlv(BIT_STRING, b"\0" + raw)


def public_key(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def modulus(key_name: str) -> int:
    """Of one of the ready-made RSA keys."""
    key = private_key(key_name)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key.public_key().public_numbers().n


def rsa_public_key(number: int, exponent: int) -> bytes:
    """SubjectPublicKeyInfo of an RSA key of any numbers."""
    key = tlv(SEQUENCE, integer(number), integer(exponent))
    return tlv(SEQUENCE, tlv(SEQUENCE, oid("1.2.840.113549.1.1.1"), tlv(NULL)), tlv(BIT_STRING, b"\0" + key))


def ec_public_key(curve: str, point: bytes) -> bytes:
    """SubjectPublicKeyInfo of an EC key of any point."""
    return tlv(SEQUENCE, tlv(SEQUENCE, oid("1.2.840.10045.2.1"), oid(curve)), tlv(BIT_STRING, b"\0" + point))


def armoured(der: bytes, label: str = "CERTIFICATE REQUEST", *, width: int = 64) -> str:
    """PEM."""
    text = base64.b64encode(der).decode()
    lines = [text[at : at + width] for at in range(0, len(text), width)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----"]) + "\n"


@dataclass(frozen=True, slots=True)
class Request:
    """A PKCS#10 request in pieces."""

    extensions: bytes = b""
    attributes: bytes | None = None  # instead of the one that carries the extensions
    version: bytes = integer(0)
    subject: bytes = name(b"")
    key: str = "ec-256"
    public: bytes | None = None  # instead of the key's own
    algorithm: bytes = algorithm(ECDSA_SHA256)
    signature: bytes | None = None
    after: bytes = b""  # inside the outer sequence

    def der(self) -> bytes:
        attributes = self.attributes
        if attributes is None:
            asked = tlv(SEQUENCE, oid(EXTENSION_REQUEST), tlv(SET, tlv(SEQUENCE, self.extensions)))
            attributes = tlv(0xA0, asked if self.extensions else b"")
        key = private_key(self.key)
        info = tlv(SEQUENCE, self.version, self.subject, self.public or public_key(key), attributes)
        return tlv(SEQUENCE, info, self.algorithm, self.signature or sign(key, info), self.after)

    def pem(self) -> str:
        return armoured(self.der())


def instant(at: datetime) -> bytes:
    """UTCTime until 2049, else GeneralizedTime."""
    if at.year < 2050:
        return tlv(UTC_TIME, f"{at:%y%m%d%H%M%SZ}".encode())
    return tlv(GENERALIZED_TIME, f"{at:%Y%m%d%H%M%SZ}".encode())


ROOT_NAME = name(b"Operator Root")
CA = extension(BASIC_CONSTRAINTS, tlv(SEQUENCE, tlv(BOOLEAN, b"\xff")), critical=True)
USAGE = extension(KEY_USAGE, tlv(BIT_STRING, b"\x01\x86"), critical=True)  # digitalSignature, keyCertSign, cRLSign
IDENTIFIER = extension(SUBJECT_KEY_ID, tlv(OCTET_STRING, bytes(range(20))))


@dataclass(frozen=True, slots=True)
class Certificate:
    """A self-signed certificate in pieces; as it stands with the right URI among its extensions, a good root."""

    extensions: tuple[bytes, ...]
    version: bytes = tlv(0xA0, integer(2))
    serial: bytes = integer(77)
    subject: bytes = ROOT_NAME
    issuer: bytes = ROOT_NAME
    not_before: bytes = field(default_factory=lambda: instant(datetime(2026, 1, 1, tzinfo=UTC)))
    not_after: bytes = field(default_factory=lambda: instant(datetime(2036, 1, 1, tzinfo=UTC)))
    key: str = "ec-256"
    signer: str = ""  # another key than its own
    public: bytes | None = None
    algorithm: bytes = algorithm(ECDSA_SHA256)
    outer_algorithm: bytes | None = None
    signature: bytes | None = None
    after: bytes = b""

    def der(self) -> bytes:
        key = private_key(self.key)
        body = tlv(
            SEQUENCE,
            self.version,
            self.serial,
            self.algorithm,
            self.issuer,
            tlv(SEQUENCE, self.not_before, self.not_after),
            self.subject,
            self.public or public_key(key),
            tlv(0xA3, tlv(SEQUENCE, *self.extensions)) if self.extensions else b"",
        )
        signature = self.signature or sign(private_key(self.signer or self.key), body)
        return tlv(SEQUENCE, body, self.outer_algorithm or self.algorithm, signature, self.after)

    def pem(self) -> str:
        return armoured(self.der(), "CERTIFICATE")
