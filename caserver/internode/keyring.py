"""The keys that one ``cluster_secret`` yields: what seals, and what signs node certificates.

A cluster secret is 32 random bytes in base64 (``caserver keygen``). HKDF-SHA-256 with separate labels derives from each
one a sealing key (AES-256-GCM), the inter-node CA key (P-256) and each node's own key. The first secret of the list seals
and issues, all of them open and verify, so that a secret can be changed without a stop.

A sealed value is ``key id (8) | nonce (12) | ciphertext and tag``; the associated data says what the value is, so that a
sealed token cannot be passed off as a sealed key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NewType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from caserver.errors import Corrupt

Sealed = NewType("Sealed", bytes)

SECRET_BYTES = 32
_KEY_ID_BYTES = 8
_NONCE_BYTES = 12
# Order of P-256 (FIPS 186-5): derived scalars are reduced into [1, n-1].
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def decode_secret(text: str) -> bytes:
    """Decode one base64 cluster secret; ValueError names the fault without the value."""
    try:
        secret = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("not base64; make one with `caserver keygen`") from exc
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"holds {len(secret)} bytes, 32 are needed; make one with `caserver keygen`")
    return secret


def sealed_key_id(value: Sealed) -> str:
    """Hex id of the key that sealed ``value``."""
    return value[:_KEY_ID_BYTES].hex()


@dataclass(frozen=True, slots=True)
class _Derived:
    key_id: bytes
    cipher: AESGCM = field(repr=False)
    ca_key: ec.EllipticCurvePrivateKey = field(repr=False)
    node_seed: bytes = field(repr=False)


def _labelled(secret: bytes, label: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=b"caserver/v1/" + label).derive(secret)


def _p256_key(secret: bytes, label: bytes) -> ec.EllipticCurvePrivateKey:
    # 48 bytes reduced mod (n-1) leave a bias below 2^-128 (FIPS 186-5 A.2.1).
    scalar = int.from_bytes(_labelled(secret, label, 48), "big") % (_P256_ORDER - 1) + 1
    return ec.derive_private_key(scalar, ec.SECP256R1())


def _derive(secret: bytes) -> _Derived:
    return _Derived(
        key_id=hashlib.sha256(_labelled(secret, b"key-id", 32)).digest()[:_KEY_ID_BYTES],
        cipher=AESGCM(_labelled(secret, b"seal", 32)),
        ca_key=_p256_key(secret, b"internode-ca"),
        node_seed=_labelled(secret, b"internode-nodes", 32),
    )


class Keyring:
    """Everything derived from the cluster secrets; the first one is current."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        if not secrets:
            raise ValueError("a keyring needs at least one cluster secret")
        derived = [_derive(secret) for secret in secrets]
        self._current = derived[0]
        self._by_id = {each.key_id: each for each in derived}
        self._all = tuple(derived)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Hex ids of all keys held, current first."""
        return tuple(each.key_id.hex() for each in self._all)

    @property
    def ca_keys(self) -> tuple[ec.EllipticCurvePrivateKey, ...]:
        """Inter-node CA keys, current first."""
        return tuple(each.ca_key for each in self._all)

    def node_key(self, node: str) -> ec.EllipticCurvePrivateKey:
        """The P-256 key of one node's certificate; who holds the secret could issue for any node anyway."""
        return _p256_key(self._current.node_seed, b"node/" + node.encode())

    def seal(self, plaintext: bytes, *, purpose: str, nonce: bytes) -> Sealed:
        """Encrypt under the current key; ``nonce`` is 12 fresh random bytes, ``purpose`` must be given again to open."""
        if len(nonce) != _NONCE_BYTES:
            raise ValueError("a nonce is 12 bytes")
        body = self._current.cipher.encrypt(nonce, plaintext, purpose.encode())
        return Sealed(self._current.key_id + nonce + body)

    def open(self, value: Sealed, *, purpose: str) -> bytes:
        """Decrypt; Corrupt if the key is not held or the value is not what ``purpose`` says."""
        held = self._by_id.get(bytes(value[:_KEY_ID_BYTES]))
        if held is None:
            raise Corrupt(
                f"a stored secret is sealed with key {sealed_key_id(value)}, which is not among the configured "
                f"cluster_secret keys ({', '.join(self.key_ids)}); add the former secret to the cluster_secret list"
            )
        nonce = value[_KEY_ID_BYTES : _KEY_ID_BYTES + _NONCE_BYTES]
        try:
            return held.cipher.decrypt(nonce, value[_KEY_ID_BYTES + _NONCE_BYTES :], purpose.encode())
        except (InvalidTag, ValueError) as exc:  # ValueError: cut short within the nonce
            raise Corrupt(
                f"a stored secret ({purpose}) does not open: it was altered or sealed for another use"
            ) from exc
