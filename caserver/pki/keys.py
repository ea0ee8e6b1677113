"""Key material: reading, writing and naming EC and RSA keys.

Which keys a CA may sign with is decided by ``load_private_key`` and ``public_key_fault``; nobody else knows the list.
"""

from __future__ import annotations

import hashlib
import re

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from caserver.environment import CURVES, PrivateKey
from caserver.errors import InvalidConfig
from caserver.fields import Secret

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192  # longer keys make every verifier in the mesh pay milliseconds a handshake
MIN_RSA_EXPONENT = 65537
MAX_RSA_EXPONENT = 2**31 - 1  # Go's crypto/rsa reads no larger one
MAX_KEY_PEM_CHARS = 32 * 1024  # RSA-16384 in PEM has 13 KiB

_PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----[\s\S]*?-----END \1-----")
_PRIVATE_LABELS = frozenset({"PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"})
_WHERE = "error parsing private key"
_CONVERT = "convert it with `openssl pkey -in old.key -out root.key` and give the contents of root.key"


def load_private_key(pem: Secret, *, judged: bool = False) -> PrivateKey:
    """Read a CA key in SEC1, PKCS#1 or PKCS#8 PEM; InvalidConfig says what is wrong and never shows the text.

    An ``EC PARAMETERS`` block before the key (``openssl ecparam -genkey`` writes one) is passed over. Refused beside
    what cannot be parsed: curves other than the NIST ones, RSA below 2048 bits or with an odd exponent, other kinds.

    ``judged`` says that the key was made here or read by this before: the numbers of an RSA key are then not proven to
    belong together, which takes 20 ms for 2048 bits and 150 ms for 4096 while nothing else runs.
    """
    block = _private_block(pem.reveal())
    try:
        key = load_pem_private_key(block.encode(), password=None, unsafe_skip_rsa_key_validation=judged)
    except TypeError:  # cryptography's word for "encrypted"
        raise InvalidConfig(f"{_WHERE}: the key is encrypted; {_CONVERT}") from None
    except (ValueError, UnsupportedAlgorithm):  # the cause may quote key bytes: it is cut off on purpose
        raise InvalidConfig(f"{_WHERE}: the PEM block does not hold a readable private key; {_CONVERT}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise InvalidConfig(f"{_WHERE}: unsupported key type; give an EC (P-256, P-384, P-521) or RSA key")
    fault = public_key_fault(key.public_key())
    if fault is not None:
        raise InvalidConfig(f"{_WHERE}: {fault}")
    return key


def _private_block(text: str) -> str:
    if len(text) > MAX_KEY_PEM_CHARS:
        raise InvalidConfig(f"{_WHERE}: longer than {MAX_KEY_PEM_CHARS} characters; give one private key in PEM")
    blocks = [match for match in _PEM_BLOCK.finditer(text) if match[1] != "EC PARAMETERS"]
    if not blocks:
        raise InvalidConfig(f"{_WHERE}: no PEM-encoded data found")
    label = blocks[0][1]
    if label == "ENCRYPTED PRIVATE KEY":
        raise InvalidConfig(f"{_WHERE}: the key is encrypted; {_CONVERT}")
    if label not in _PRIVATE_LABELS:
        raise InvalidConfig(f"{_WHERE}: unknown PEM block type for signing key: {label}")
    if len(blocks) > 1:
        raise InvalidConfig(f"{_WHERE}: {len(blocks)} PEM blocks found; give the private key alone")
    if "Proc-Type:" in blocks[0][0]:
        raise InvalidConfig(f"{_WHERE}: the key is encrypted; {_CONVERT}")
    return blocks[0][0] + "\n"


def public_key_fault(key: object) -> str | None:
    """Why a CA must not sign with this key, as a phrase; None if it may."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        known = {curve.name for curve in CURVES.values()}
        return None if key.curve.name in known else f"curve {key.curve.name} is not P-224, P-256, P-384 or P-521"
    if isinstance(key, rsa.RSAPublicKey):
        return rsa_fault(key)
    return "unsupported key type; give an EC (P-256, P-384, P-521) or RSA key"


def rsa_fault(key: rsa.RSAPublicKey) -> str | None:
    """What makes an RSA key unfit for the mesh, as a phrase; None if nothing does."""
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return f"an RSA key of {key.key_size} bits is not between {MIN_RSA_BITS} and {MAX_RSA_BITS} bits"
    exponent = key.public_numbers().e
    if not MIN_RSA_EXPONENT <= exponent <= MAX_RSA_EXPONENT or exponent % 2 == 0:
        return f"the RSA public exponent is not an odd number between {MIN_RSA_EXPONENT} and {MAX_RSA_EXPONENT}"
    return None


def pkcs8_pem(key: PrivateKey) -> Secret:
    """The key as unencrypted PKCS#8 PEM."""
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def sec1_pem(key: PrivateKey) -> str:
    """The key in the traditional form, ``EC PRIVATE KEY`` or ``RSA PRIVATE KEY``, as leaf answers carry it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()


def key_info(public_key: object) -> tuple[str, int]:
    """Kind (``ec`` or ``rsa``) and bits; InvalidConfig with Consul's text for any other kind."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return "ec", public_key.curve.key_size
    if isinstance(public_key, rsa.RSAPublicKey):
        return "rsa", public_key.key_size
    raise InvalidConfig("error extracting root key info: unsupported key type")


def public_key_der(public_key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def subject_key_id(public_key: PublicKey) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo, 32 bytes (Consul's key id; RFC 5280 4.2.1.2 leaves the method free)."""
    return hashlib.sha256(public_key_der(public_key)).digest()


def colon_hex(value: bytes) -> str:
    """Lower-case hex, two digits a byte, joined by colons; empty for no bytes."""
    return value.hex(":")


def is_ec(key: PrivateKey) -> bool:
    """Whether the key is an elliptic-curve key."""
    return isinstance(key, ec.EllipticCurvePrivateKey)


def root_hash(key: PrivateKey | PublicKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512:
    """The hash with which a root of this key signs itself: SHA-384 for P-384, SHA-512 for P-521, else SHA-256."""
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        if key.curve.key_size == 384:  # noqa: PLR2004 - the curve's name
            return hashes.SHA384()
        if key.curve.key_size == 521:  # noqa: PLR2004 - the curve's name
            return hashes.SHA512()
    return hashes.SHA256()
