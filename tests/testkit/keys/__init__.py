"""Throw-away private keys made once, so that no test waits for an RSA key. They protect nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

NAMES = ("ec-224", "ec-256", "ec-256-b", "ec-384", "ec-521", "rsa-2048", "rsa-2048-b", "rsa-4096", "ed25519")


def key_pem(name: str) -> str:
    """PKCS#8 PEM of the key called ``name``."""
    return (Path(__file__).parent / f"{name}.pem").read_text()


@cache
def private_key(name: str) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    """The EC or RSA key called ``name``; every call returns the same object."""
    # That these are sound need not be proven anew by every run: for the RSA keys it takes half a second.
    key = load_pem_private_key(key_pem(name).encode(), password=None, unsafe_skip_rsa_key_validation=True)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    return key


@cache
def ed25519_key() -> ed25519.Ed25519PrivateKey:
    """A key of a kind that the CA does not take."""
    key = load_pem_private_key(key_pem("ed25519").encode(), password=None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    return key
