"""Chains: is a finished leaf what was ordered, does it verify, and which cross-signed certificates must travel with it.

Verification is a path search as RFC 5280 section 6 wants it for this profile (names, key identifiers, signatures,
validity, basic constraints, key usage, purposes, URI name constraints). It is our own because general-purpose verifiers
insist on a host name, which SPIFFE leaves do not have. ``proof`` asks OpenSSL the same question.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID

from caserver.errors import InvalidConfig, ProviderRefused
from caserver.pki import certificates
from caserver.pki.certificates import LEAF_EXTENDED_KEY_USAGE, LEAF_KEY_USAGE, LeafTemplate, extension, load_certificate

MAX_DEPTH = 32  # certificates between a leaf and a root; OpenSSL, Go and Envoy stop at 100 or later
# Cross-signed certificates that a leaf carries. They go into every handshake: eight of RSA-4096 roots are 10 kB (of P-256
# roots 4.5 kB), which still leaves in TCP's first flight. Older bundles matter only to who slept through eight rotations.
HOPS_MAX = 8
_FOREIGN_BACKDATED_MAX = 3600  # seconds that an external provider's NotBefore may lie before ours

_KNOWN_CRITICAL = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
    }
)


def check_leaf(leaf_pem: str, template: LeafTemplate, issuer_pem: str) -> None:
    """RuntimeError unless the finished leaf is what ``template`` orders, signed by ``issuer_pem`` and within its life.

    The last look before a leaf leaves the CA: a mismatch is a bug or a tampered provider, never the caller's mistake.
    """
    leaf = x509.load_pem_x509_certificate(leaf_pem.encode())
    issuer = load_certificate(issuer_pem)
    wrong = [
        what
        for what, right in (
            ("serial", leaf.serial_number == template.serial),
            ("public key", _key_der(leaf) == template.public_key),
            ("subject", _common_names(leaf) == ([template.common_name] if template.common_name else [])),
            ("validity", _validity(leaf) == (template.not_before, template.not_after)),
            ("validity beyond its issuer's", leaf.not_valid_after_utc <= issuer.not_valid_after_utc),
            ("issuer or signature", _issued(leaf, issuer)),
            ("extensions", _has_leaf_profile(leaf, template, issuer)),
        )
        if not right
    ]
    if wrong:
        raise RuntimeError(f"the signed leaf for {template.spiffe_uri} is not what was ordered: {', '.join(wrong)}")


@dataclass(frozen=True, slots=True)
class ForeignLeaf:
    """A finished leaf whose serial and instants another one chose; instants are epoch seconds."""

    pem: str  # one block, final newline
    serial: int
    not_before: int
    not_after: int


def check_foreign_leaf(leaf_pem: str, template: LeafTemplate, issuer_pem: str, *, now: int) -> ForeignLeaf:
    """What an external provider signed, if it is what ``template`` orders; ProviderRefused names what it is not.

    Such a provider draws the serial, dates the leaf by its own clock up to the template's NotAfter, and may leave the
    common name out. ``template.serial`` is not looked at.
    """
    try:
        leaf = x509.load_pem_x509_certificate(leaf_pem.encode())
        issuer = load_certificate(issuer_pem)
        starts, ends = _validity(leaf)
        wrong = [what for what, right in _foreign_checks(leaf, template, issuer) if not right]
        unknown = _critical_fault(leaf)
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
        raise ProviderRefused(f"what was signed for {template.spiffe_uri} is no certificate that can be read") from exc
    if unknown is not None:
        wrong.append(unknown)
    if ends > template.not_after:
        wrong.append("it lives longer than was booked")
    if not template.not_before - _FOREIGN_BACKDATED_MAX <= starts <= now < ends:
        wrong.append(f"it is valid from {_utc(starts)} to {_utc(ends)}, and now is {_utc(now)}: are the clocks right?")
    if wrong:
        raise ProviderRefused(
            f"the leaf that was signed for {template.spiffe_uri} is not what was ordered and was thrown away: "
            f"{'; '.join(wrong)}"
        )
    return ForeignLeaf(certificates.to_pem(leaf), leaf.serial_number, starts, ends)


def _foreign_checks(
    leaf: x509.Certificate, template: LeafTemplate, issuer: x509.Certificate
) -> Iterable[tuple[str, bool]]:
    usage, constraints = extension(leaf, x509.KeyUsage), extension(leaf, x509.BasicConstraints)
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    authority = extension(leaf, x509.AuthorityKeyIdentifier)
    names = _common_names(leaf)
    return (
        ("it has another public key", _key_der(leaf) == template.public_key),
        ("it has another subject", names in ([], [template.common_name])),
        ("it has other names", _has_only_name(leaf, template.spiffe_uri, critical=not names)),
        ("its key usage does not fit a leaf", usage is not None and _is_leaf_usage(usage)),
        (
            "it is not for TLS clients and servers",
            purposes is not None and set(purposes) == set(LEAF_EXTENDED_KEY_USAGE),
        ),
        ("it does not say CA:FALSE", constraints is not None and not constraints.ca),
        ("its serial is not positive", leaf.serial_number > 0),
        ("another certificate issued it", _issued(leaf, issuer)),
        (
            "it names another key as its issuer's",
            authority is None or authority.key_identifier in (None, certificates.key_id(issuer)),
        ),
        ("it outlives its issuer", leaf.not_valid_after_utc <= issuer.not_valid_after_utc),
    )


def _has_only_name(leaf: x509.Certificate, uri: str, *, critical: bool) -> bool:
    """Whether ``uri`` is the only alternative name; ``critical`` if it must be marked so (RFC 5280 4.2.1.6)."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return False
    return list(found.value) == [x509.UniformResourceIdentifier(uri)] and (found.critical or not critical)


def _is_leaf_usage(usage: x509.KeyUsage) -> bool:
    return usage.digital_signature and not usage.key_cert_sign and not usage.crl_sign


def _utc(instant: int) -> str:
    return f"{datetime.fromtimestamp(instant, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _key_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _common_names(certificate: x509.Certificate) -> list[str | bytes]:
    return [attribute.value for attribute in certificate.subject]


def _validity(certificate: x509.Certificate) -> tuple[int, int]:
    return (
        int(certificate.not_valid_before_utc.timestamp()),
        int(certificate.not_valid_after_utc.timestamp()),
    )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _has_leaf_profile(leaf: x509.Certificate, template: LeafTemplate, issuer: x509.Certificate) -> bool:
    names = extension(leaf, x509.SubjectAlternativeName)
    constraints = extension(leaf, x509.BasicConstraints)
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    return (
        names is not None
        and list(names) == [x509.UniformResourceIdentifier(template.spiffe_uri)]
        and constraints is not None
        and not constraints.ca
        and extension(leaf, x509.KeyUsage) == LEAF_KEY_USAGE
        and purposes is not None
        and set(purposes) == set(LEAF_EXTENDED_KEY_USAGE)
        and extension(leaf, x509.AuthorityKeyIdentifier) == certificates.issuer_key_identifier(issuer)
    )


def verify_chain(leaf_pem: str, intermediates: Iterable[str], roots: Iterable[str], at: datetime) -> str | None:
    """None if the leaf verifies against one of ``roots`` at instant ``at``, else a sentence that says why not.

    ``intermediates`` may come in any order and hold more than is needed. All certificates are single PEM blocks. Of
    several dead ends the one that came nearest to a root is reported.
    """
    try:
        leaf = load_certificate(leaf_pem)
        pool = [load_certificate(pem) for pem in intermediates]
        anchors = [load_certificate(pem) for pem in roots]
    except InvalidConfig as exc:
        return f"a certificate of the chain cannot be read: {exc.detail}"
    fault = _leaf_fault(leaf, at)
    if fault is not None:
        return fault
    search = _Search(at, tuple(pool), tuple(anchors))
    return None if search.reaches_root((leaf,)) else search.reason


def _leaf_fault(leaf: x509.Certificate, at: datetime) -> str | None:
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    if purposes is not None and not set(LEAF_EXTENDED_KEY_USAGE) <= set(purposes):
        return f"{_named(leaf)} may not be used for TLS clients and servers"
    return _time_fault(leaf, at) or _critical_fault(leaf)


class _Search:
    """Depth-first search from a leaf to an anchor, remembering the deepest dead end."""

    def __init__(self, at: datetime, pool: tuple[x509.Certificate, ...], anchors: tuple[x509.Certificate, ...]) -> None:
        self._at = at
        self._pool = pool
        self._anchors = anchors
        self._depth = -1
        self.reason = "there is no root to verify against"

    def reaches_root(self, path: tuple[x509.Certificate, ...]) -> bool:
        """Whether ``path``, leaf first, can be continued to an anchor."""
        if any(self._accepts(path, anchor) for anchor in self._anchors):
            return True
        if len(path) > MAX_DEPTH:
            return False
        candidates = [each for each in self._pool if not any(_same_authority(each, passed) for passed in path)]
        if any(self._accepts(path, each) and self.reaches_root((*path, each)) for each in candidates):
            return True
        if not any(_named_issuer(path[-1], each) for each in (*self._anchors, *candidates)):
            self._note(path, f"no certificate at hand issued {_named(path[-1])}")
        return False

    def _accepts(self, path: tuple[x509.Certificate, ...], issuer: x509.Certificate) -> bool:
        if not _named_issuer(path[-1], issuer):
            return False
        fault = _issuer_fault(path, issuer, self._at)
        if fault is not None:
            self._note(path, fault)
        return fault is None

    def _note(self, path: tuple[x509.Certificate, ...], reason: str) -> None:
        if len(path) > self._depth:
            self._depth = len(path)
            self.reason = reason


def _named_issuer(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether names and key identifiers point from one to the other; the signature is looked at afterwards."""
    if certificate.issuer != issuer.subject:
        return False
    authority = extension(certificate, x509.AuthorityKeyIdentifier)
    wanted = None if authority is None else authority.key_identifier
    held = certificates.key_id(issuer)
    return wanted is None or held is None or wanted == held


def _same_authority(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Same name and key: passing through it again would only go round in a circle."""
    return one.subject == other.subject and _key_der(one) == _key_der(other)


def _issuer_fault(path: tuple[x509.Certificate, ...], issuer: x509.Certificate, at: datetime) -> str | None:
    return (
        _signature_fault(path[-1], issuer)
        or _time_fault(issuer, at)
        or _authority_fault(issuer, below=len(path) - 1)
        or _critical_fault(issuer)
        or _constraint_fault(path[0], issuer)
    )


def _signature_fault(certificate: x509.Certificate, issuer: x509.Certificate) -> str | None:
    if _issued(certificate, issuer):
        return None
    return f"the signature of {_named(certificate)} does not verify with the key of {_named(issuer)}"


def _time_fault(certificate: x509.Certificate, at: datetime) -> str | None:
    if at < certificate.not_valid_before_utc:
        return f"{_named(certificate)} is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}"
    if at > certificate.not_valid_after_utc:
        return f"{_named(certificate)} expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
    return None


def _authority_fault(issuer: x509.Certificate, *, below: int) -> str | None:
    """``below`` counts the CA certificates between this one and the leaf."""
    constraints = extension(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return f"{_named(issuer)} is not a CA certificate: its Basic Constraints do not say CA:TRUE"
    if constraints.path_length is not None and below > constraints.path_length:
        return f"{_named(issuer)} allows {constraints.path_length} CA certificates below it, the chain has {below}"
    usage = extension(issuer, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return f"{_named(issuer)} may not sign certificates: its Key Usage lacks keyCertSign"
    purposes = extension(issuer, x509.ExtendedKeyUsage)
    if purposes is not None and not set(LEAF_EXTENDED_KEY_USAGE) <= set(purposes):
        return f"{_named(issuer)} may not issue for TLS clients and servers"
    return None


def _critical_fault(certificate: x509.Certificate) -> str | None:
    unknown = [
        each.oid.dotted_string for each in certificate.extensions if each.critical and each.oid not in _KNOWN_CRITICAL
    ]
    return f"{_named(certificate)} has unknown critical extensions {', '.join(unknown)}" if unknown else None


def _constraint_fault(leaf: x509.Certificate, issuer: x509.Certificate) -> str | None:
    limits = extension(issuer, x509.NameConstraints)
    name = "".join(str(value) for value in _common_names(leaf))
    if limits is None or all(
        certificates.permits(limits, uri=uri, common_name=name) for uri in certificates.uri_sans(leaf)
    ):
        return None
    return f"{_named(issuer)} excludes the leaf by its Name Constraints"


def _named(certificate: x509.Certificate) -> str:
    subject = certificate.subject.rfc4514_string() or ", ".join(certificates.uri_sans(certificate))
    return f"certificate {subject} (serial {certificate.serial_number:x})"


def unexpired(pems: Iterable[str], at: datetime) -> tuple[str, ...]:
    """Those of ``pems`` that are valid at instant ``at``, in order: what a leaf signed now may carry."""
    return tuple(pem for pem in pems if _time_fault(load_certificate(pem), at) is None)


@dataclass(frozen=True, slots=True)
class _Hop:
    """A CA certificate that may be part of a path, with the text that goes into chains."""

    pem: str
    certificate: x509.Certificate


def intermediates_for(
    new_root_pem: str,
    cross_signed_pem: str | None,
    previous: Sequence[tuple[str, Sequence[str]]],
    at: datetime,
    *,
    at_most: int = HOPS_MAX,
) -> tuple[str, ...]:
    """What leaves under the new root must carry so that every bundle in use still verifies them.

    ``previous`` holds each root of the trust bundle before the change with its intermediates. For every such root that
    is alive at instant ``at`` the shortest path of cross-signed certificates from the new root is kept, shortest
    paths first, each certificate once; expired certificates and those on no such path fall away. Without
    ``cross_signed_pem`` only paths that exist already count (going back to a former root). No more than ``at_most`` are
    kept: paths that do not fit are left out, the longest first. PEM texts are handed on as they came, with a final newline.
    """
    new_root = load_certificate(new_root_pem)
    given = ([] if cross_signed_pem is None else [cross_signed_pem]) + [pem for _, pems in previous for pem in pems]
    pool = [_Hop(pem, load_certificate(pem)) for pem in dict.fromkeys(given)]
    pool = [hop for hop in pool if _time_fault(hop.certificate, at) is None]
    # Of certificates for the same authority the one that lives longest is met first.
    pool.sort(key=lambda hop: hop.certificate.not_valid_after_utc, reverse=True)
    anchors = [load_certificate(pem) for pem, _ in previous]
    anchors = [
        anchor for anchor in anchors if _time_fault(anchor, at) is None and not _same_authority(anchor, new_root)
    ]
    paths = [path for anchor in anchors if (path := _shortest_path(new_root, anchor, pool))]
    kept = dict[str, None]()
    for path in sorted(paths, key=len):
        wanted = kept | dict.fromkeys(hop.pem for hop in path)
        if len(wanted) <= at_most:
            kept = wanted
    return tuple(pem if pem.endswith("\n") else pem + "\n" for pem in kept)


def beyond_reach(
    new_root_pem: str, carried: Iterable[str], known: Iterable[str], root_pems: Iterable[str]
) -> tuple[str, ...]:
    """Those of ``root_pems`` to which the ``known`` cross-signed certificates lead from the new root, the ``carried`` ones not."""
    new_root = load_certificate(new_root_pem)
    near = [_Hop(pem, load_certificate(pem)) for pem in carried]
    far = [_Hop(pem, load_certificate(pem)) for pem in known]
    anchors = [(pem, load_certificate(pem)) for pem in root_pems]
    return tuple(
        pem
        for pem, anchor in anchors
        if not _same_authority(anchor, new_root)
        and _shortest_path(new_root, anchor, near) is None
        and _shortest_path(new_root, anchor, far) is not None
    )


def _shortest_path(start: x509.Certificate, anchor: x509.Certificate, pool: Sequence[_Hop]) -> tuple[_Hop, ...] | None:
    """The fewest certificates of ``pool`` that lead from the authority ``start`` to ``anchor``; None if none do.

    Breadth first, each authority entered once, so that roots which cross-signed each other often cost nothing.
    """
    open_paths: deque[tuple[_Hop, ...]] = deque((hop,) for hop in pool if _same_authority(hop.certificate, start))
    entered = [start]
    while open_paths:
        path = open_paths.popleft()
        last = path[-1].certificate
        if _leads_to(last, anchor):
            return path
        for hop in pool:
            if _leads_to(last, hop.certificate) and not any(_same_authority(hop.certificate, each) for each in entered):
                entered.append(hop.certificate)
                open_paths.extend((*path, twin) for twin in pool if _same_authority(twin.certificate, hop.certificate))
    return None


@functools.lru_cache(maxsize=4096)  # every search for a path asks the same pairs again, and a signature takes its time
def _leads_to(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    return _named_issuer(certificate, issuer) and _issued(certificate, issuer)
