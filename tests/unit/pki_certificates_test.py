"""Certificate profiles (contract section 3) and the judgement on an operator's root (contract section 5)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import permutations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from caserver.errors import InvalidConfig, ProviderRefused
from caserver.fields import fault_text
from caserver.pki import certificates, keys
from caserver.pki.certificates import describe, load_certificate, operator_root_faults, serial_from
from tests.testkit.keys import ed25519_key, key_pem, private_key
from tests.testkit.mesh import NOW, TRUST_DOMAIN, crossed, root

CA_KEYS = ("ec-224", "ec-256", "ec-384", "ec-521", "rsa-2048", "rsa-4096")
URI = f"spiffe://{TRUST_DOMAIN}"
LEAF_TTL = 72 * 3600


def extension_facts(certificate: x509.Certificate) -> list[tuple[str, bool]]:
    return [(each.oid._name, each.critical) for each in certificate.extensions]


# --- serials and names ---


def test_a_serial_is_positive_and_of_127_bits():
    assert {serial_from(bytes([byte]) * 16).bit_length() for byte in range(256)} == {127}


def test_serials_of_different_bytes_differ():
    assert serial_from(b"\x00" * 16) != serial_from(b"\x00" * 15 + b"\x01")


def test_a_root_is_named_as_consul_names_it():
    assert certificates.root_common_name(TRUST_DOMAIN, b"\x00" * 8) == "pri-00000000.consul.ca.11111111.consul"


# --- profiles ---


@pytest.mark.parametrize(
    ("key_name", "signature"),
    [("ec-224", "sha256"), ("ec-384", "sha384"), ("ec-521", "sha512"), ("rsa-4096", "sha256")],
)
def test_a_generated_root_has_the_recorded_profile(key_name: str, signature: str):
    certificate = load_certificate(root(key_name))
    key_id = keys.subject_key_id(private_key(key_name).public_key())

    assert extension_facts(certificate) == [
        ("keyUsage", True),
        ("basicConstraints", True),
        ("subjectKeyIdentifier", False),
        ("authorityKeyIdentifier", False),
        ("subjectAltName", False),
    ]
    assert certificates.extension(certificate, x509.KeyUsage) == certificates.ROOT_KEY_USAGE
    assert certificates.extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(
        ca=True, path_length=None
    )
    assert certificates.key_id(certificate) == key_id
    assert certificates.extension(certificate, x509.AuthorityKeyIdentifier) == x509.AuthorityKeyIdentifier(
        key_id, None, None
    )
    assert certificates.uri_sans(certificate) == (URI,)
    assert certificate.signature_hash_algorithm is not None
    assert certificate.signature_hash_algorithm.name == signature
    certificate.verify_directly_issued_by(certificate)


def test_making_the_same_root_twice_gives_the_same_bytes():
    assert root("ec-384") == root("ec-384")


def test_facts_of_a_root_are_consuls():
    facts = describe(root("ec-521"))

    assert (facts.key_type, facts.key_bits, facts.serial, facts.is_ca) == ("ec", 521, 7, True)
    assert facts.not_before == int(NOW.timestamp()) - 300
    assert facts.not_after == int(NOW.timestamp()) + 3650 * 86400
    assert facts.signing_key_id == keys.colon_hex(keys.subject_key_id(private_key("ec-521").public_key()))
    assert facts.uri_sans == (URI,)
    assert facts.subject == facts.issuer == "CN=root of ec-521"
    assert len(facts.id) == 59


@pytest.mark.parametrize(
    ("old", "new"), [(old, new) for old, new in permutations(CA_KEYS, 2) if "rsa-4096" not in (old, new)]
)
def test_a_root_is_cross_signed_by_any_other_kind(old: str, new: str):
    old_pem, new_pem = root(old), root(new)
    target = load_certificate(new_pem)

    certificate = load_certificate(crossed(new_pem, old=old_pem, old_key=old))

    assert certificate.subject == target.subject
    assert certificate.public_key() == target.public_key()
    assert certificate.issuer == load_certificate(old_pem).subject
    assert extension_facts(certificate) == [
        ("keyUsage", True),
        ("basicConstraints", True),
        ("subjectKeyIdentifier", False),
        ("subjectAltName", False),
        ("authorityKeyIdentifier", False),
    ]
    for kind in (x509.KeyUsage, x509.BasicConstraints, x509.SubjectKeyIdentifier, x509.SubjectAlternativeName):
        assert certificates.extension(certificate, kind) == certificates.extension(target, kind)
    authority = certificates.extension(certificate, x509.AuthorityKeyIdentifier)
    assert authority is not None
    assert authority.key_identifier == keys.subject_key_id(private_key(old).public_key())
    assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
    certificate.verify_directly_issued_by(load_certificate(old_pem))


def test_a_cross_signed_certificate_outlives_neither_issuer_nor_subject():
    short, long = root("ec-256", days=3), root("ec-384", start=NOW - timedelta(days=1))

    under_short = describe(crossed(long, old=short, old_key="ec-256"))
    of_short = describe(crossed(short, old=long, old_key="ec-384"))

    assert under_short.not_after == describe(short).not_after
    assert under_short.not_before == int(NOW.timestamp()) - 60
    assert of_short.not_after == describe(short).not_after


def test_an_expired_root_cross_signs_nothing():
    expired = root("ec-256", start=NOW - timedelta(days=9), days=2)

    with pytest.raises(ProviderRefused, match="ForceWithoutCrossSigning"):
        crossed(root("ec-384"), old=expired, old_key="ec-256")


# --- an operator's root ---


class Builder:
    """An operator's root that is right but for what a test changes."""

    def __init__(self) -> None:
        self.key = private_key("ec-256")
        self.public: object = self.key.public_key()
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
        self.issuer = self.subject
        self.start, self.end = NOW - timedelta(hours=1), NOW + timedelta(days=3650)
        self.extensions: dict[str, tuple[x509.ExtensionType, bool]] = {
            "constraints": (x509.BasicConstraints(ca=True, path_length=None), True),
            "usage": (certificates.ROOT_KEY_USAGE, True),
            "key id": (x509.SubjectKeyIdentifier(b"\x01" * 20), False),
            "names": (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URI)]), False),
        }
        self.signing_key: object = self.key
        self.algorithm: object = hashes.SHA256()

    def pem(self) -> str:
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(self.issuer)
            .public_key(self.public)  # type: ignore[arg-type]
            .serial_number(2**150 + 5)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
        )
        for value, critical in self.extensions.values():
            builder = builder.add_extension(value, critical)
        algorithm = None if self.signing_key is ed25519_key() else self.algorithm
        return certificates.to_pem(builder.sign(self.signing_key, algorithm))  # type: ignore[arg-type]


def faults_of(pem: str, *, key_name: str = "ec-256", leaf_ttl: int = LEAF_TTL) -> str:
    faults = operator_root_faults(pem, private_key(key_name), trust_domain=TRUST_DOMAIN, now=NOW, leaf_ttl=leaf_ttl)
    return fault_text(faults)


def changed(change: Callable[[Builder], object]) -> str:
    builder = Builder()
    change(builder)
    return builder.pem()


def with_names(*names: x509.GeneralName) -> Callable[[Builder], object]:
    return lambda builder: builder.extensions.update(names=(x509.SubjectAlternativeName(names), False))


def with_extension(name: str, value: x509.ExtensionType, *, critical: bool) -> Callable[[Builder], object]:
    return lambda builder: builder.extensions.update({name: (value, critical)})


def not_self_signed(builder: Builder) -> None:
    builder.issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another")])


def without_name(builder: Builder) -> None:
    builder.subject = builder.issuer = x509.Name([])


def ed25519_root(builder: Builder) -> None:
    builder.public, builder.signing_key = ed25519_key().public_key(), ed25519_key()


def foreign_curve(builder: Builder) -> None:
    builder.signing_key = ec.derive_private_key(7, ec.SECP256K1())
    builder.public = builder.signing_key.public_key()


def broken_extension(builder: Builder) -> None:
    builder.extensions["constraints"] = (x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"\x05\x00"), True)


def usage_without_signing() -> x509.KeyUsage:
    return certificates.LEAF_KEY_USAGE


def uri(value: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(value)


@pytest.mark.parametrize("key_name", CA_KEYS)
def test_a_generated_root_would_pass_as_an_operators_own(key_name: str):
    assert faults_of(root(key_name), key_name=key_name) == ""


def test_a_sound_root_is_accepted_with_or_without_final_newline():
    pem = Builder().pem()

    assert faults_of(pem) == faults_of(pem.rstrip("\n")) == faults_of("\n" + pem.replace("\n", "\r\n")) == ""


def test_a_key_that_lives_elsewhere_is_not_compared():
    assert operator_root_faults(Builder().pem(), None, trust_domain=TRUST_DOMAIN, now=NOW, leaf_ttl=LEAF_TTL) == []


FAULTY: dict[str, tuple[Callable[[Builder], object], str]] = {
    "no basic constraints": (lambda b: b.extensions.pop("constraints"), "RootCert: has no Basic Constraints"),
    "no CA": (
        with_extension("constraints", x509.BasicConstraints(ca=False, path_length=None), critical=True),
        "is not a CA (CA:FALSE)",
    ),
    "path length": (
        with_extension("constraints", x509.BasicConstraints(ca=True, path_length=0), critical=True),
        "limits the path length to 0",
    ),
    "not critical": (
        with_extension("constraints", x509.BasicConstraints(ca=True, path_length=None), critical=False),
        "not critical",
    ),
    "no key usage": (lambda b: b.extensions.pop("usage"), "has no Key Usage"),
    "no certSign": (with_extension("usage", usage_without_signing(), critical=True), "lacks keyCertSign"),
    "no SKI": (lambda b: b.extensions.pop("key id"), "has no Subject Key Identifier"),
    "no SAN": (lambda b: b.extensions.pop("names"), f"does not carry the URI of this cluster, {URI}"),
    "no URI": (with_names(x509.DNSName("ca.example")), "its URI names are none"),
    "other domain": (with_names(uri("spiffe://22222222-2222-3333-4444-555555555555.consul")), "22222222"),
    "http": (with_names(uri(f"http://{TRUST_DOMAIN}")), f"the only one must be {URI}"),
    "path": (with_names(uri(f"{URI}/ns/default")), f"the only one must be {URI}"),
    "upper case": (with_names(uri(f"spiffe://{TRUST_DOMAIN.upper()}X")), f"the only one must be {URI}"),
    "two URIs": (with_names(uri(URI), uri("spiffe://x.consul")), f"the only one must be {URI}"),
    "DNS name": (with_names(uri(URI), x509.DNSName("ca.example")), "carries names beside the URI"),
    "not self-signed": (not_self_signed, "is not self-signed"),
    "empty subject": (
        without_name,
        "subject is empty",
    ),
    "expired": (lambda b: setattr(b, "end", NOW - timedelta(seconds=1)), "expired at 2030-06-01T11:59:59Z"),
    "not yet valid": (
        lambda b: setattr(b, "start", NOW + timedelta(minutes=1)),
        "is not yet valid: it begins at 2030-06-01T12:01:00Z",
    ),
    "short": (lambda b: setattr(b, "end", NOW + timedelta(hours=1)), "before a leaf of 72h0m0s issued now would"),
    "ed25519": (ed25519_root, "error extracting root key info: unsupported key type\nRootCert: "),
    "foreign curve": (foreign_curve, "curve secp256k1"),
    "odd hash": (
        lambda b: setattr(b, "algorithm", hashes.SHA3_256()),
        "is not signed with SHA-256, SHA-384 or SHA-512",
    ),
    "broken extension": (broken_extension, "error parsing root cert: asn1: structure error"),
    "server only": (
        with_extension("eku", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False),
        "lacks clientAuth or serverAuth",
    ),
    "excluded": (
        with_extension("limits", x509.NameConstraints([uri(".example.com")], None), critical=True),
        "Name Constraints exclude",
    ),
    "DNS constraint": (
        with_extension("limits", x509.NameConstraints([x509.DNSName(TRUST_DOMAIN)], None), critical=False),
        "Name Constraints exclude",
    ),
    "other AKI": (
        with_extension("aki", x509.AuthorityKeyIdentifier(b"x" * 20, None, None), critical=False),
        "names another key",
    ),
    "unknown critical": (
        with_extension("odd", x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00"), critical=True),
        "1.2.3.4",
    ),
}


@pytest.mark.parametrize(("change", "text"), FAULTY.values(), ids=list(FAULTY))
def test_a_root_that_would_break_the_mesh_is_refused_by_name_of_the_fault(
    change: Callable[[Builder], object], text: str
):
    refusal = faults_of(changed(change))

    assert text in refusal
    assert refusal.count("openssl req -x509") == 1


def test_name_constraints_that_admit_the_trust_domain_are_accepted():
    dns = x509.NameConstraints([x509.DNSName("consul"), uri(TRUST_DOMAIN)], None)

    assert faults_of(changed(with_extension("limits", dns, critical=True))) == ""


def test_a_key_of_another_certificate_is_refused():
    assert "PrivateKey: does not belong to RootCert" in faults_of(Builder().pem(), key_name="ec-256-b")
    assert "PrivateKey: does not belong to RootCert" in faults_of(Builder().pem(), key_name="rsa-2048")


def test_all_faults_are_named_at_once_and_the_commands_once():
    def everything(builder: Builder) -> None:
        builder.extensions.clear()
        builder.end = NOW

    lines = faults_of(changed(everything)).splitlines()

    assert [line.split(";")[0] for line in lines[:5]] == [
        "RootCert: has no Basic Constraints",
        "RootCert: has no Key Usage",
        "RootCert: has no Subject Key Identifier",
        f"RootCert: does not carry the URI of this cluster, {URI}",
        "RootCert: expired at 2030-06-01T12:00:00Z",
    ]
    assert [line.split(" -")[0] for line in lines[5:]] == ["openssl genpkey", "openssl req"]


@pytest.mark.parametrize(
    ("pem", "first_line"),
    [
        ("garbage", "error parsing root fingerprint: no PEM-encoded data found"),
        ("", "error parsing root fingerprint: no PEM-encoded data found"),
        (key_pem("ec-256"), "error parsing root fingerprint: first PEM-block should be CERTIFICATE type"),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "error parsing root cert: asn1: structure error: the block is not a certificate",
        ),
        (
            Builder().pem().replace("\n", "\\n"),
            "error parsing root cert: asn1: structure error: the block is not a certificate",
        ),
    ],
)
def test_what_is_no_certificate_is_refused_with_consuls_text(pem: str, first_line: str):
    assert faults_of(pem).splitlines()[0] == first_line
    with pytest.raises(InvalidConfig) as refused:
        describe(pem)
    assert refused.value.detail == first_line


def test_two_certificates_and_text_around_one_are_refused():
    pem = Builder().pem()

    assert "RootCert: holds 2 PEM blocks" in faults_of(pem + pem)
    assert "RootCert: holds 2 PEM blocks" in faults_of(pem + key_pem("ec-256"))
    assert "RootCert: has text around the certificate" in faults_of("subject=ours\n" + pem)


def test_a_subject_that_is_no_text_is_a_fault_like_any_other():
    good = x509.load_pem_x509_certificate(root("ec-256").encode())
    (name,) = good.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(name.value).encode()
    length, printable, utf8 = bytes([len(text)]), b"\x13", b"\x0c"
    no_text = utf8 + length + b"\xff" * len(text)
    der = good.public_bytes(Encoding.DER).replace(printable + length + text, no_text)
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()

    with pytest.raises(InvalidConfig, match="error parsing root cert"):
        load_certificate(pem)


def test_a_root_is_named_in_the_encoding_in_which_others_would_write_its_name_anew():
    der = x509.load_pem_x509_certificate(root("ec-256").encode()).subject.public_bytes()

    assert b"\x06\x03\x55\x04\x03\x13" in der  # common name, PrintableString
