"""Is the root that stands at a Vault path fit to be this cluster's root? Pure judgements on certificates."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from caserver.errors import InvalidConfig
from caserver.fields import Fault, format_go_duration
from caserver.pki.certificates import describe, extension, load_certificate
from caserver.state.model import Effective

_FIELD = "RootPKIPath"


def root_faults(pem: str, *, where: str, effective: Effective, now: datetime) -> list[Fault]:
    """Everything that keeps the certificate at ``where`` from being a root under which leaves verify."""
    try:
        certificate = load_certificate(pem)
        describe(pem)
    except InvalidConfig as exc:
        remedy = "have an RSA or EC root there, or give an empty path to have one generated"
        return [Fault(_FIELD, f"the certificate at {where} cannot be used: {exc.detail}", remedy, _heading(where))]
    faults = [*_kind_faults(certificate, where), *_life_faults(certificate, where, effective, now)]
    return [Fault(each.field, each.problem, each.remedy, _heading(where)) for each in faults]


def _heading(where: str) -> str:
    return f"error configuring provider: the CA at {where} cannot be the root"


def _kind_faults(certificate: x509.Certificate, where: str) -> list[Fault]:
    constraints = extension(certificate, x509.BasicConstraints)
    usage = extension(certificate, x509.KeyUsage)
    if constraints is None or not constraints.ca:
        return [Fault(_FIELD, f"the certificate at {where} is no CA", "give the path of a root CA")]
    faults = []
    if certificate.subject != certificate.issuer or not _signed_by(certificate, certificate):
        issuer = certificate.issuer.rfc4514_string()
        problem = f"{where} holds an intermediate CA that {issuer} issued, and verifiers need the root itself"
        faults.append(Fault(_FIELD, problem, "give the path where the root is, or another one for a root of its own"))
    if constraints.path_length == 0:
        problem = f"the root at {where} may not sign CA certificates (path length 0), so no intermediate can be made"
        faults.append(Fault(_FIELD, problem, "use a root without a path length, or with 1 or more"))
    if usage is not None and not usage.key_cert_sign:
        faults.append(Fault(_FIELD, f"the key usage of the root at {where} lacks keyCertSign", "use another root"))
    return faults


def _life_faults(certificate: x509.Certificate, where: str, effective: Effective, now: datetime) -> list[Fault]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    remedy = "give a path with another root, or an empty one to have a root generated"
    if ends <= now:
        return [Fault(_FIELD, f"the root at {where} expired at {_utc(ends)}", remedy)]
    if begins > now:
        return [Fault(_FIELD, f"the root at {where} is not valid before {_utc(begins)}", "check the clocks, or wait")]
    if (ends - now).total_seconds() < effective.leaf_ttl:
        ttl = format_go_duration(effective.leaf_ttl)
        return [Fault(_FIELD, f"the root at {where} ends at {_utc(ends)}, before a leaf of {ttl} would", remedy)]
    return []


def lifetime_warnings(pem: str, *, where: str, effective: Effective, now: datetime) -> list[str]:
    """What the root's end makes shorter than it was configured."""
    ends = load_certificate(pem).not_valid_after_utc
    if (ends - now).total_seconds() >= effective.intermediate_ttl:
        return []
    ttl = format_go_duration(effective.intermediate_ttl)
    return [
        f"the root at {where} ends at {_utc(ends)}: intermediates end with it, not after IntermediateCertTTL ({ttl})"
    ]


def is_issued_by(pem: str, issuer_pem: str) -> bool:
    """Whether one certificate names and carries the signature of another."""
    return _signed_by(load_certificate(pem), load_certificate(issuer_pem))


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _utc(instant: datetime) -> str:
    return f"{instant:%Y-%m-%dT%H:%M:%SZ}"
