"""The signer of leaves, with a fast path: hand-assembled DER for P-256 leaf keys.

``Issuer`` encodes once what is constant under one signing certificate (algorithm, issuer name, key identifiers, fixed
extensions) and per leaf only what ``LeafTemplate`` holds. Any other leaf key goes through the builder of
``certificates``. Both ways give the same to-be-signed bytes; a differential test compares them.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding

from caserver.environment import PrivateKey
from caserver.pki import certificates, keys
from caserver.pki.certificates import LeafTemplate

# DER identifiers (X.690): universal types, and the context tags of RFC 5280.
_INTEGER, _BIT_STRING, _OCTET_STRING, _UTF8, _UTC_TIME, _GENERALIZED_TIME = 0x02, 0x03, 0x04, 0x0C, 0x17, 0x18
_SEQUENCE, _SET = 0x30, 0x31
_KEY_ID_TAG, _URI_TAG, _EXTENSIONS_TAG = 0x80, 0x86, 0xA3

_VERSION_3 = bytes.fromhex("a003020102")
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_RSA_SHA256 = bytes.fromhex("300d06092a864886f70d01010b0500")
_COMMON_NAME = bytes.fromhex("0603550403")
# SubjectPublicKeyInfo of an uncompressed P-256 point up to the point: 26 bytes of head, 65 of point.
_P256_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_P256_BYTES = 91
# Key usage, extended key usage and basic constraints of a leaf, whole extensions.
_FIXED_EXTENSIONS = bytes.fromhex(
    "300e0603551d0f0101ff0404030203b8"
    "301d0603551d250416301406082b0601050507030206082b06010505070301"
    "300c0603551d130101ff04023000"
)
_KEY_ID_HEAD = bytes.fromhex("30290603551d0e0422") + bytes.fromhex("0420")
_AUTHORITY_ID = bytes.fromhex("0603551d23")
_SAN = bytes.fromhex("0603551d11")
_SAN_CRITICAL = bytes.fromhex("0603551d110101ff")
_FIRST_GENERALIZED = datetime(2050, 1, 1, tzinfo=UTC).timestamp()  # RFC 5280 4.1.2.5
_SHORT_FORM = 0x80
_PEM_LINE = 64


def _tlv(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < _SHORT_FORM:
        return bytes((tag, size)) + body
    encoded = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, _SHORT_FORM | len(encoded))) + encoded + body


def _integer(value: int) -> bytes:
    return _tlv(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _time(instant: int) -> bytes:
    moment = datetime.fromtimestamp(instant, UTC)
    if instant >= _FIRST_GENERALIZED:
        return _tlv(_GENERALIZED_TIME, f"{moment:%Y%m%d%H%M%SZ}".encode())
    return _tlv(_UTC_TIME, f"{moment:%y%m%d%H%M%SZ}".encode())


def _subject(common_name: str) -> bytes:
    if not common_name:
        return _tlv(_SEQUENCE, b"")
    attribute = _tlv(_SEQUENCE, _COMMON_NAME + _tlv(_UTF8, common_name.encode()))
    return _tlv(_SEQUENCE, _tlv(_SET, attribute))


def _alternative_name(uri: str, *, critical: bool) -> bytes:
    names = _tlv(_SEQUENCE, _tlv(_URI_TAG, uri.encode("ascii")))
    return _tlv(_SEQUENCE, (_SAN_CRITICAL if critical else _SAN) + _tlv(_OCTET_STRING, names))


def _pem(der: bytes) -> str:
    text = base64.b64encode(der).decode()
    lines = [text[start : start + _PEM_LINE] for start in range(0, len(text), _PEM_LINE)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


class Issuer:
    """A signing certificate and its key; safe to use from several threads.

    Signatures are deterministic: signing the same template twice gives the same bytes.
    """

    def __init__(self, certificate_pem: str, key: PrivateKey) -> None:
        self._certificate = certificates.load_certificate(certificate_pem)
        self._key = key
        self._algorithm = _ECDSA_SHA256 if keys.is_ec(key) else _RSA_SHA256
        self._head = self._algorithm + self._certificate.subject.public_bytes()
        digest = certificates.key_id(self._certificate)
        self._authority = b"" if digest is None else _authority_extension(digest)

    def sign(self, template: LeafTemplate) -> str:
        """The finished leaf in PEM: one block, final newline."""
        if not _is_plain_p256(template.public_key):
            return self.sign_by_builder(template)
        unsigned = self._unsigned(template)
        signature = self._signature(unsigned)
        return _pem(_tlv(_SEQUENCE, unsigned + self._algorithm + _tlv(_BIT_STRING, b"\0" + signature)))

    def sign_by_builder(self, template: LeafTemplate) -> str:
        """The same leaf by way of cryptography's builder: any leaf key, several times slower."""
        builder = certificates.leaf_builder(template, self._certificate)
        signed: x509.Certificate = certificates.sign_certificate(builder, self._key, hashes.SHA256())
        return signed.public_bytes(Encoding.PEM).decode()

    def _unsigned(self, template: LeafTemplate) -> bytes:
        extensions = b"".join(
            (
                _FIXED_EXTENSIONS,
                _KEY_ID_HEAD,
                hashlib.sha256(template.public_key).digest(),
                self._authority,
                _alternative_name(template.spiffe_uri, critical=not template.common_name),
            )
        )
        body = b"".join(
            (
                _VERSION_3,
                _integer(template.serial),
                self._head,
                _tlv(_SEQUENCE, _time(template.not_before) + _time(template.not_after)),
                _subject(template.common_name),
                template.public_key,
                _tlv(_EXTENSIONS_TAG, _tlv(_SEQUENCE, extensions)),
            )
        )
        return _tlv(_SEQUENCE, body)

    def _signature(self, unsigned: bytes) -> bytes:
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(unsigned, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return self._key.sign(unsigned, padding.PKCS1v15(), hashes.SHA256())


def _is_plain_p256(public_key: bytes) -> bool:
    return len(public_key) == _P256_BYTES and public_key.startswith(_P256_HEAD)


def _authority_extension(digest: bytes) -> bytes:
    identifier = _tlv(_SEQUENCE, _tlv(_KEY_ID_TAG, digest))
    return _tlv(_SEQUENCE, _AUTHORITY_ID + _tlv(_OCTET_STRING, identifier))
