"""Cross-signing with roots that live in Vault: asking for it with the new root's key, and doing it with the old one's."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from caserver.errors import ProviderRefused
from caserver.pki.certificates import key_id, load_certificate, uri_sans
from caserver.providers.vault.engine import Issuer, PKIEngine
from caserver.providers.vault.fitness import is_issued_by

# What Vault's API takes of a subject, by its own names; it writes them in an order of its own.
_SUBJECT = {
    "organization": NameOID.ORGANIZATION_NAME,
    "ou": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "country": NameOID.COUNTRY_NAME,
    "locality": NameOID.LOCALITY_NAME,
    "province": NameOID.STATE_OR_PROVINCE_NAME,
    "street_address": NameOID.STREET_ADDRESS,
    "postal_code": NameOID.POSTAL_CODE,
}


async def crossing_request(engine: PKIEngine, issuer: Issuer, root_pem: str) -> str | None:
    """A CSR by the root's key with the root's names, PEM; None if Vault does not make one."""
    if not issuer.key_id:
        return None
    subject = load_certificate(root_pem).subject
    parts = {name: [str(each.value) for each in subject.get_attributes_for_oid(oid)] for name, oid in _SUBJECT.items()}
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return await engine.request_cross_signing(
        issuer.key_id,
        common_name=str(names[0].value) if names else "",
        uris=uri_sans(load_certificate(root_pem)),
        subject={name: values for name, values in parts.items() if values},
    )


async def cross_signed(
    engine: PKIEngine,
    issuer_id: str,
    issuer_pem: str,
    target_pem: str,
    *,
    csr_pem: str | None,
    not_after: datetime,
) -> str:
    """``target_pem`` certified by the issuer, PEM; ProviderRefused if no verifier would take it for the same authority.

    Verifiers written in Go and Rust compare names byte by byte, and Vault cannot ask for every name in every encoding: a
    root whose own request would not match is signed as it stands, which keeps its serial and its life.
    """
    target, issuer = load_certificate(target_pem), load_certificate(issuer_pem)
    ends = min(not_after, issuer.not_valid_after_utc, target.not_valid_after_utc)
    if csr_pem is not None and _asks_for(csr_pem, target):
        pem = await engine.sign_ca(issuer_id, csr_pem, not_after=ends)
    else:
        pem = await _as_it_stands(engine, issuer_id, target_pem)
    made = load_certificate(pem)
    if not is_issued_by(pem, issuer_pem) or not _same_authority(made, target):
        raise ProviderRefused(
            f"what {engine.path} cross-signed is not the new root ({target.subject.rfc4514_string()}); "
            "ForceWithoutCrossSigning = true rotates without it"
        )
    return pem


async def _as_it_stands(engine: PKIEngine, issuer_id: str, target_pem: str) -> str:
    try:
        return await engine.sign_self_issued(issuer_id, target_pem)
    except ProviderRefused as exc:
        raise ProviderRefused(
            f"{exc.detail}\nthe new root's name cannot be requested from Vault, so it is signed as it stands, which takes "
            "that permission (on some servers with sudo); ForceWithoutCrossSigning = true rotates without it"
        ) from exc


def _asks_for(csr_pem: str, target: x509.Certificate) -> bool:
    csr = x509.load_pem_x509_csr(csr_pem.encode())
    return csr.subject.public_bytes() == target.subject.public_bytes() and _spki(csr) == _spki(target)


def _same_authority(made: x509.Certificate, target: x509.Certificate) -> bool:
    return (
        made.subject.public_bytes() == target.subject.public_bytes()
        and _spki(made) == _spki(target)
        and key_id(made) == key_id(target)
    )


def _spki(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
